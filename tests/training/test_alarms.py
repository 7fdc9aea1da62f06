"""Alarms: the rules on figures, and runs of the trainer that really go wrong."""

import json
import math
import re
from copy import deepcopy

import pytest
import torch

from gspo.policy.rollout import TransformersEngine
from gspo.training.alarms import (
    EmergencyStop,
    gibberish_reason,
    held_out_fall,
    repetition,
    stop_reason,
    unjudged_reason,
    unreadable_characters,
    warnings_of,
)
from support.metrics import GOOD
from support.sorting import problems, trainer


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", math.nan),
        ("grad_norm", math.inf),
        ("importance_ratio_max", 101.0),
        ("importance_ratio_min", 0.009),
        ("importance_ratio_mean", math.nan),
        ("entropy", math.nan),
        ("clip_fraction_by_minibatch", [0.0, math.nan]),
        ("sampler_gap", 2.0),
    ],
)
def test_bad_updates_are_stopped_and_the_evidence_named(name, value):
    assert stop_reason(GOOD) is None
    # The farthest token ratios of GRPO runs that learnt (docs/alarms.md).
    assert stop_reason({**GOOD, "importance_ratio_min": 0.0069, "importance_ratio_max": 67.8}, True) is None
    assert name in stop_reason({**GOOD, name: value})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"importance_ratio_max": 11}, "importance ratios"),
        ({"importance_ratio_min": 0.05}, "importance ratios"),
        ({"clip_fraction": 0.9}, "clipped"),
        ({"null_clip_fraction": 0.2}, "null_clip_fraction"),
    ],
)
def test_warnings_look_at_the_last_batch(change, word):
    assert warnings_of([GOOD] * 40) == {}
    (warning,) = warnings_of([GOOD, {**GOOD, **change}]).values()
    assert word in warning


def test_warnings_look_at_the_history():
    unmeasured = {name: value for name, value in GOOD.items() if name != "null_clip_fraction"}
    noisy = {**GOOD, "null_clip_fraction": 0.2}
    assert "null clip" in warnings_of([noisy, unmeasured])  # until it is measured again
    assert "null clip" not in warnings_of([noisy, GOOD, unmeasured])
    tied = {**GOOD, "zero_variance_groups": 1.0}
    assert warnings_of([tied] * 4) == {}
    assert "every group's rewards were equal" in warnings_of([tied] * 5)["no signal"]
    no_update = {**GOOD, "grad_norm": 0.0}  # rewards differ, and every group is filtered out
    assert warnings_of([no_update] * 4) == warnings_of([no_update] * 4 + [GOOD]) == {}
    assert "no update was made" in warnings_of([no_update] * 5)["no signal"]


def test_a_gradient_norm_that_stays_far_above_its_start_is_told():
    start, high, idle = [GOOD] * 5, {**GOOD, "grad_norm": 10.1}, {**GOOD, "grad_norm": 0.0}
    assert "10.1 against 1:" in warnings_of([*start, *[high] * 5])["gradient"]
    assert "gradient" in warnings_of([*start, *[high, idle] * 5]), "a batch without an update says nothing"
    assert warnings_of([*start, *[high] * 4]) == {}
    assert warnings_of([*start, *[high] * 4, GOOD]) == {}
    assert warnings_of([*start, *[{**GOOD, "grad_norm": 9.9}] * 5]) == {}
    assert warnings_of([high] * 20) == {}, "AdamW does not see the size of the gradient"
    assert warnings_of([{**GOOD, "grad_norm": 100.0}, *[GOOD] * 4, *[{**GOOD, "grad_norm": 9.0}] * 5]) == {}


def test_ratios_of_whole_responses_that_stay_far_from_1_are_told():
    low, high = {**GOOD, "importance_ratio_min": 0.79}, {**GOOD, "importance_ratio_max": 1.26}
    near = {**GOOD, "importance_ratio_min": 0.81, "importance_ratio_max": 1.24}
    far = [low, high, low, high, low]
    assert "outside 0.8 to 1.25, the last time they reached 0.79" in warnings_of(far)["sequence ratio"]
    assert warnings_of(far[1:]) == warnings_of([near, *far[1:]]) == warnings_of([near] * 20) == {}
    assert warnings_of(far, clips_per_token=True) == {}, "the ratios of single tokens are healthy there"
    cannot_clip = {**GOOD, "eligible_fraction": 0.0}
    assert "sequence ratio" in warnings_of([*far[:4], cannot_clip, low])


def evaluation(step, *passes, rewards=None):
    rewards = rewards or passes
    means = {"pass_at_1": sum(passes) / len(passes), "reward_mean": sum(rewards) / len(rewards)}
    return {"step": step, "pass_by_problem": passes, "reward_by_problem": rewards, **means}


def test_a_held_out_fall_is_told_if_it_is_more_than_chance():
    best, start = evaluation(25, *[0.5] * 10), evaluation(0, *[0.2] * 10)
    # Differences of -.5 and 0, each five times: mean -.25, and 2.262 times the standard error .083 is .188.
    fallen = evaluation(50, *[0.0] * 5, *[0.5] * 5)
    # -.5, +.5, -.5 and seven times 0: mean -.05, half the standard error .084 above 0.
    noise = evaluation(50, 0.0, 1.0, 0.0, *[0.5] * 7)
    assert "pass_at_1 has fallen to 0.25 from 0.5 at rollout batch 25" in held_out_fall([best, fallen])
    assert held_out_fall([start, best, fallen]), "the last is above the first, but below the best"
    assert held_out_fall([fallen]) is None and held_out_fall([best, noise]) is None
    assert held_out_fall([start, best]) is held_out_fall([start, start]) is None
    # The best of many is the best partly by luck: the interval, 2.26 standard errors, grows to 3.77.
    assert held_out_fall([*[start] * 60, best, fallen]) is None
    assert held_out_fall([*[start] * 60, best, evaluation(50, *[0.0] * 10)])
    dense = [evaluation(step, *[0.0] * 10, rewards=[reward] * 10) for step, reward in ((0, 0.4), (25, 0.3))]
    assert "reward_mean has fallen to 0.3 from 0.4" in held_out_fall(dense)
    assert held_out_fall([evaluation(0, 1.0), evaluation(25, 0.0)]) is None, "one problem has no interval"


def test_a_run_tells_a_held_out_fall_once(tmp_path, capsys):
    t = trainer(**settings(tmp_path, num_epochs=2, eval_frequency=1))
    scores = iter([0.5, 0.8, 0.1, 0.1, 0.8])
    t.evaluate = lambda _: {k: v for k, v in evaluation(0, *[next(scores)] * 4).items() if k != "step"} | {
        "interval_95": [0.0, 1.0], "response_tokens_mean": 9.0}  # fmt: skip
    run_of(tmp_path, t)
    said = capsys.readouterr().err
    assert said.count("has fallen") == 1 and "warning, rollout batch 2: held-out pass_at_1 has fallen" in said


def test_a_run_ends_where_nothing_can_be_judged_and_not_for_a_few_problems():
    unjudged = {**GOOD, "zero_variance_groups": 1.0, "groups_all_right": 0.0, "groups_all_wrong": 0.0}
    tied = {**GOOD, "zero_variance_groups": 1.0, "groups_all_right": 0.5, "groups_all_wrong": 0.5}
    assert unjudged_reason([unjudged], window=1) == "no response of the rollout batch could be judged"
    assert unjudged_reason([tied], window=1) is unjudged_reason([tied] * 5) is None
    assert unjudged_reason([unjudged] * 4) is unjudged_reason([GOOD] + [unjudged] * 4) is None
    assert "of the last 5 rollout batches" in unjudged_reason([GOOD] + [unjudged] * 5)


@pytest.mark.parametrize(
    ("kind", "change", "batches", "message"),
    [
        ("ratio spread", {"ratio_spread": 24.0}, 5, "24 clip ranges from 1.*acts as zero.*about 8 times"),
        ("clips most", {"clip_fraction_eligible": 0.7}, 10, "more than 60 % .* the last time 70%"),
        (
            "clips nothing",
            {"clip_fraction_eligible": 0.004},
            10,
            "0.4%: the clip range has no effect",
        ),
        ("entropy", {"entropy": 0.12}, 5, "entropy has fallen to 0.12 nats per token from 1.5 at the start"),
    ],
)
def test_warnings_about_clipping_and_entropy(kind, change, batches, message):
    bad, cannot_clip = {**GOOD, **change}, {**GOOD, **change, "eligible_fraction": 0.0}
    start = [GOOD] * 10
    assert kind not in warnings_of([*start, *[bad] * (batches - 1)])
    assert re.search(message, warnings_of([*start, *[bad] * batches])[kind])
    if kind != "entropy":  # batches in which nothing could clip say nothing about the clip range
        assert warnings_of([cannot_clip] * 20) == {}
        assert kind in warnings_of([bad, cannot_clip] * batches)
    # A token's ratio is far from GRPO's range in few tokens, in a healthy run.
    assert (kind in warnings_of([*start, *[bad] * batches], clips_per_token=True)) == (
        kind != "clips nothing"
    )


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        ({"ratio_spread": 9.9}, {"ratio_spread": 10.1}),
        ({"clip_fraction_eligible": 0.59}, {"clip_fraction_eligible": 0.61}),
        ({"clip_fraction_eligible": 0.011}, {"clip_fraction_eligible": 0.009}),
        ({"entropy": 0.16}, {"entropy": 0.14}),
    ],
)
def test_where_these_warnings_begin(change, bound):
    assert warnings_of([GOOD] * 10 + [{**GOOD, **change}] * 10) == {}
    assert len(warnings_of([GOOD] * 10 + [{**GOOD, **bound}] * 10)) == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"entropy": 8.0}, "entropy"),
        ({"entropy": 0.01}, "entropy"),
        ({"response_tokens_mean": 1.0}, "tokens"),
        ({"repetition": 0.9}, "repetition"),
        ({"unreadable_characters": 0.3}, "unreadable"),
        ({"truncated_fraction": 1.0}, "do not end"),
    ],
)
def test_text_is_measured_against_the_start(change, word):
    bad = {**GOOD, **change, "reward_mean": 0.0}
    assert gibberish_reason([GOOD] * 10) is None
    assert word in gibberish_reason([GOOD] * 5 + [bad] * 5)
    assert gibberish_reason([GOOD] * 6 + [bad] * 4) is None
    assert gibberish_reason([bad] * 20) is None, "a model that always was so has not got worse"
    assert gibberish_reason([{**GOOD, "reward_mean": 0.0}] * 5 + [bad] * 5) is None, "nothing was lost"
    half = {**bad, "reward_mean": 0.15}
    assert gibberish_reason([GOOD] * 5 + [half] * 5) is None
    assert word in warnings_of([GOOD] * 5 + [half] * 5)["text"]
    assert "text" not in warnings_of([GOOD] * 5 + [{**bad, "reward_mean": 0.4}] * 5), "it has learnt"


def test_measures_of_text():
    assert repetition([1, 2, 3]) == repetition(range(100)) == 0
    assert repetition([7] * 23) == 1 - 1 / 20
    assert repetition([1, 2, 3, 4, 5] * 2) == pytest.approx(2 / 7)
    assert unreadable_characters("") == unreadable_characters("Löwe, 狮子 🦁\n\tx = 1\u00a0km") == 0
    assert unreadable_characters("ab\x00\ufffd") == 0.5


def run_of(tmp_path, t, count=8):
    try:
        return t.train(problems(count), problems(4, seed=1))
    finally:
        run = tmp_path / "r"
        t.lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def settings(tmp_path, **other):
    return {"output_dir": str(tmp_path), "run_name": "r", "num_epochs": 10, "eval_frequency": 0} | other


def no_reward(asked, _):
    return [0.0] * len(asked)


def test_a_learning_rate_of_one_is_stopped(tmp_path):
    t = trainer(**settings(tmp_path, learning_rate=1.0, save_frequency=1))
    with pytest.raises(EmergencyStop, match="importance_ratio_min is .* below 0.01") as stop:
        t.train(problems(8), problems(4, seed=1))
    assert t.step == 0, "the second update would have followed the first"
    evidence = json.loads((tmp_path / "r" / "emergency" / "metrics.json").read_text())
    assert evidence["reason"] == str(stop.value) and evidence["step"] == t.step + 1
    assert len((tmp_path / "r" / "emergency" / "samples.jsonl").read_text().splitlines()) == 16
    batch = torch.load(tmp_path / "r" / "emergency" / "rollout_batch.pt", weights_only=True)
    assert len(batch["samples"]) == 16


def test_a_weight_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    t = trainer(**settings(tmp_path, save_frequency=2))
    update = t.update

    def break_a_weight(batch):
        metrics = update(batch)
        if t.step == 2:
            t.model.model.norm.weight.data[0] = math.inf
        return metrics

    t.update = break_a_weight
    with pytest.raises(EmergencyStop, match="model.norm.weight"):
        run_of(tmp_path, t)
    assert [path.name for path in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-2"]
    assert len(t.lines) == 3


def test_a_stale_sampler_is_told(tmp_path, capsys):
    t = trainer(**settings(tmp_path, learning_rate=1e-4, num_epochs=4))
    t.engine = TransformersEngine(deepcopy(t.model), t.tokenizer)
    run_of(tmp_path, t)
    gaps = [line["sampler_gap"] for line in t.lines]
    assert gaps[0] < 1e-5 and gaps[-1] > 1e-2
    assert "does the sampler get the new weights?" in capsys.readouterr().err


def test_a_single_gap_of_rounding_is_no_stale_sampler():
    history = [GOOD | {"sampler_gap": gap} for gap in (0.002, 0.009, 0.003, 0.009, 0.009)]
    assert "stale sampler" not in warnings_of(history)
    assert "stale sampler" in warnings_of([*history, GOOD | {"sampler_gap": 0.009}])


def test_a_sampler_of_another_model_is_refused(tmp_path):
    t = trainer(reward_fn=lambda asked, _: [i % 2 for i in range(len(asked))], **settings(tmp_path))
    other = deepcopy(t.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.3)
    t.engine = TransformersEngine(other, t.tokenizer)
    with pytest.raises(EmergencyStop, match="sampler_gap"):
        t.train_step(problems(4))


def test_rewards_that_tie_are_told_early_with_what_to_try(tmp_path, capsys):
    run_of(tmp_path, trainer(reward_fn=no_reward, **settings(tmp_path, num_epochs=4)))
    said = capsys.readouterr().err
    assert "warning, rollout batch 5: no learning signal" in said and "--difficulty" in said


def test_gibberish_is_stopped(tmp_path):
    """A policy that is pushed to a uniform choice, for which nothing is paid."""
    t = trainer(**settings(tmp_path, num_epochs=20))
    update = t.update

    def drift(batch):
        metrics = update(batch)
        if t.step == 5:
            t.reward_fn = no_reward
            t.model.get_input_embeddings().weight.data *= 0.02
        return metrics

    t.update = drift
    with pytest.raises(EmergencyStop, match="gibberish: entropy"):
        run_of(tmp_path, t)
    assert (tmp_path / "r" / "emergency" / "samples.jsonl").exists()
    assert (tmp_path / "r" / "checkpoints" / f"step-{t.step}").exists()


def test_a_reward_that_is_no_number_is_stopped():
    for reward in (math.inf, math.nan):
        with pytest.raises(EmergencyStop, match="reward"):
            trainer(reward_fn=lambda asked, _, reward=reward: [reward] * len(asked)).train_step(problems(4))
