"""The trainer on the tiny model and its own task (sorting digits): real updates, in seconds."""

import json
import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo.checks import float64_reference as reference
from gspo.policy.rollout import Rollout, Sampling, TransformersEngine, encode_prompt
from gspo.training.alarms import EmergencyStop
from gspo.training.record import GLOSSARY, OPTIONAL
from gspo.training.rollout_batch import Sample
from gspo.training.sampling import evaluation_metrics
from gspo.training.training_run import drop_long_prompts
from gspo_implementation import ALGORITHMS, group_advantages
from support.records import lines_of, without_seconds
from support.sorting import Sort, problems, trainer, weights_of


def test_first_minibatch_never_clips_and_later_ones_do():
    step = trainer(batch_size=8, mini_batch_size=2, group_size=8).train_step(problems(8))
    first, *later = step["clip_fraction_by_minibatch"]
    assert first == 0 and len(later) == 3 and max(later) > 0
    assert step["null_clip_fraction"] == 0
    assert 0 < step["clip_fraction"] < 1 and step["grad_norm"] > 0


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_update_a_batch_has_a_ratio_of_exactly_one(name, dtype, algorithm):
    t = trainer(name, algorithm=algorithm, dtype=dtype, batch_size=2, mini_batch_size=2)
    step = t.train_step(problems(2))
    assert (step["importance_ratio_min"], step["importance_ratio_max"]) == (1, 1)
    assert step["clip_fraction"] == step["null_clip_fraction"] == 0


# Adam's very first step is the sign of the gradient: it turns where bfloat16 noise turns the sign of the
# smallest gradients (cosine .984 to .992), so bfloat16 is compared once the moments exist.
@pytest.mark.parametrize(("dtype", "updates_before"), [("float32", 0), ("float32", 4), ("bfloat16", 4)])
def test_update_at_1e_6_moves_the_weights_as_a_float64_step_does(dtype, updates_before):
    t = trainer(dtype=dtype, learning_rate=1e-6, batch_size=8, mini_batch_size=8, group_size=16)
    for i in range(updates_before):
        t.train_step(problems(8, seed=100 + i))
    batch = t.collect(problems(8), 0)
    exact = deepcopy(t.model).double()
    exact_optimizer = torch.optim.AdamW(exact.parameters(), lr=1e-6, weight_decay=0.0)
    if updates_before:
        exact_optimizer.load_state_dict(deepcopy(t.optimizer.state_dict()))
    for sample in batch.samples:
        rollout = sample.rollout
        log_probs = reference.token_log_probs(exact, rollout.prompt_ids, rollout.response_ids)
        ratio = torch.exp((log_probs - log_probs.detach()).mean())
        (-sample.advantage * ratio / len(batch.samples)).backward()
    before = weights_of(t.model)
    norm = torch.nn.utils.clip_grad_norm_(exact.parameters(), t.config.max_grad_norm)
    exact_optimizer.step()
    # Adam hides the gradient's scale, the norm does not.
    assert t.update(batch)["grad_norm"] == pytest.approx(
        norm.item(), rel=1e-4 if dtype == "float32" else 0.02
    )
    moved, expected = weights_of(t.model) - before, weights_of(exact) - before
    cosine = torch.dot(moved, expected) / (moved.norm() * expected.norm())
    assert cosine > 0.99
    assert moved.norm().item() == pytest.approx(expected.norm().item(), rel=0.02)


@pytest.mark.parametrize("algorithm", ["sapo", "cispo", "dppo"])
def test_micro_batches_never_change_the_loss_gradient_or_kl(algorithm):
    """The mean is over the responses, or over the tokens, of the update; that of the KL over responses."""
    found = []
    for tokens in (4096, 1):
        t = trainer(algorithm=algorithm, mini_batch_size=2, micro_batch_tokens=tokens, kl_coef=0.1, seed=1)
        t.train_step(problems(4, seed=1))
        metrics = t.train_step(problems(4))
        found.append([metrics[name] for name in ("loss", "grad_norm", "kl", "clip_fraction", "ratio_spread")])
    assert found[1] == pytest.approx(found[0], rel=2e-3, abs=1e-6)
    assert found[0][2] > 0


def test_the_kl_is_a_mean_over_responses_for_every_algorithm():
    losses = []
    for algorithm in ("gspo", "cispo"):
        t = trainer(algorithm=algorithm, kl_coef=0.1)
        samples = t.collect(problems(4), 0).minibatches()[0]
        log_probs = [sample.old_log_probs for sample in samples]
        for sample in samples:
            sample.advantage, sample.reference_log_probs = 0.0, sample.old_log_probs - 0.3
        denominator = t.algorithm.denominator(samples)
        losses.append(t._loss(samples, log_probs, denominator, num_responses=len(samples))[0].item())
    # r = exp(-.3): r - 1 - log r, at every token
    assert losses == pytest.approx([0.1 * (math.exp(-0.3) - 1 + 0.3)] * 2, rel=1e-4)


def test_noise_that_caps_every_weight_of_cispo_counts_once():
    """Its cap holds for advantages of either sign."""
    t = trainer(algorithm="cispo")
    minibatches = t.collect(problems(4), 0).minibatches()
    for sample in minibatches[0]:
        if sample.has_signal:
            sample.old_log_probs = sample.old_log_probs - 3  # a ratio of 20
    assert t._null_clip_fraction(minibatches) == 1


def test_a_narrow_dppo_range_clips_in_the_trainer():
    """ratio_spread is in what the range bounds: the probability of a token."""
    t = trainer(algorithm="dppo", left_clip_range=1e-3, right_clip_range=1e-3, group_size=8)
    metrics = t.train_step(problems(4))
    assert metrics["clip_fraction_by_minibatch"][0] == metrics["null_clip_fraction"] == 0
    assert 0.05 < metrics["clip_fraction_eligible"] < 0.95
    moved = []
    batch = t.collect(problems(4, seed=1), 1)
    t.update(batch)
    for sample in batch.samples:
        if sample.ratio_spread is not None:
            moved.append(sample.ratio_spread)
    assert max(moved) <= 1 / 1e-3  # a probability cannot move by more than 1


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_micro_batches_and_checkpointing_never_change_the_update(name):
    moved, norms = [], []
    for settings in (
        {},
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 100},
        {"gradient_checkpointing": True},
    ):
        t = trainer(name, batch_size=4, mini_batch_size=2, **settings)
        before = weights_of(t.model)
        norms.append(t.train_step(problems(4))["grad_norm"])
        moved.append(weights_of(t.model) - before)
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-3)
    for other in moved[1:]:
        assert (other - moved[0]).norm() / moved[0].norm() < 2e-3


def test_temperature_is_that_of_sampling():
    t = trainer(temperature=0.6, batch_size=4, group_size=8)
    batch = t.collect(problems(4), 0)
    computed = [sample for sample in batch.samples if sample.old_log_probs is not None]
    assert computed
    for sample in computed:
        sampled = torch.tensor(sample.rollout.log_probs)
        torch.testing.assert_close(sample.old_log_probs, sampled, rtol=1e-3, atol=1e-3)


def test_the_samplers_pi_old_is_the_trainers_to_rounding():
    """Of equal types; no forward pass is made before the updates, and the first update can clip."""
    settings = {"group_size": 8, "temperature": 0.8}
    other, t = trainer(**settings), trainer(pi_old="sampler", **settings)
    batch, trainers = t.collect(problems(4), 0), other.collect(problems(4), 0)  # 0 has all of the trainer's
    compared = 0
    for sample, same in zip(batch.samples, trainers.samples, strict=True):
        assert sample.rollout == same.rollout
        assert torch.equal(sample.old_log_probs, torch.tensor(sample.rollout.log_probs))
        if same.old_log_probs is not None:
            compared += 1
            torch.testing.assert_close(sample.old_log_probs, same.old_log_probs, rtol=1e-4, atol=1e-4)
    assert compared and batch.metrics["null_clip_fraction"] == 0
    minibatches = []
    t.forward.all_log_probs = lambda model, asked, *_: minibatches.extend(asked) or []
    batch = t.collect(problems(4), 1)
    assert minibatches == []
    metrics = t.update(batch)
    with_advantage = sum(sample.num_tokens for sample in batch.samples if sample.advantage)
    assert metrics["eligible_fraction"] == with_advantage / sum(sample.num_tokens for sample in batch.samples)
    assert 0 < metrics["sampler_gap"] < 1e-4  # that of the first update, before the weights move
    first = batch.minibatches()[0]
    assert all(sample.ratio_spread is not None for sample in first if sample.advantage)


@pytest.mark.parametrize("pi_old", ["trainer", "sampler"])
def test_a_bfloat16_sampler_beside_a_float32_trainer(pi_old):
    """The gap is that of bfloat16, far above float32's rounding; what it clips by itself is measured."""
    t = trainer(pi_old=pi_old, rollout_dtype="bfloat16", group_size=8, mismatch_mask=0.02)
    batch = t.collect(problems(4), 0)
    own = t.forward.all_log_probs(t.model, batch.minibatches())
    gaps = torch.cat([log_probs - sample.sampled_log_probs for sample, log_probs in own]).abs()
    metrics = t.update(batch)
    assert 1e-3 < gaps.mean() < 3e-2
    if pi_old == "trainer":
        assert metrics["sampler_gap"] == pytest.approx(gaps.mean().item(), rel=0.5)
        assert metrics["sampler_gap_max"] == pytest.approx(gaps.max().item(), rel=1e-3)
        assert 1e-6 < metrics["sampler_kl"] < 1e-2 and 0 < metrics["sampler_ess"] < 1
        assert metrics["clip_fraction_by_minibatch"][0] == metrics["null_clip_fraction"] == 0
    else:
        assert 1e-3 < metrics["sampler_gap"] < 3e-2
        assert not {"sampler_kl", "masked_fraction"} & set(metrics)
        assert metrics["null_clip_fraction"] > 0.5  # of a range of 3e-4 and 4e-4
        assert metrics["clip_fraction_by_minibatch"][0] > 0.2
    assert t.evaluate(problems(4)) == t.evaluate(problems(4))


def test_shuffled_rewards_stay_in_their_groups_and_evaluations_keep_theirs():
    def collected(**settings):
        t = trainer(group_size=8, **settings)
        batch = t.collect(problems(4), 1)
        return t, batch, [[sample.reward for sample in group] for group in batch.groups()]

    t, plain, rewards = collected()
    other, shuffled, permuted = collected(shuffle_rewards=True)
    responses = [[sample.rollout for sample in batch.samples] for batch in (plain, shuffled)]
    assert responses[0] == responses[1]
    assert list(map(sorted, rewards)) == list(map(sorted, permuted)) and rewards != permuted
    for group in shuffled.groups():  # an advantage belongs to the reward beside it, and not to the response
        tensor = torch.tensor([sample.reward for sample in group], dtype=torch.float64)
        assert [sample.advantage for sample in group] == group_advantages(tensor, 8).tolist()
    same = ("reward_mean", "reward_std", "zero_variance_groups", "groups_all_right", "groups_all_wrong")
    assert [plain.metrics[name] for name in same] == pytest.approx([shuffled.metrics[name] for name in same])
    assert collected(shuffle_rewards=True)[2] == permuted != collected(shuffle_rewards=True, seed=1)[2]
    assert t.evaluate(problems(4)) == other.evaluate(problems(4))
    for sample in shuffled.samples:  # what belongs to a reward moves with it
        assert sample.passed == (sample.reward == 1)


def test_policy_is_refreshed_every_k_rollout_batches(tmp_path):
    t = trainer(
        update_frequency=2, batch_size=2, group_size=16, output_dir=str(tmp_path), run_name="k", num_epochs=1
    )
    t.train(problems(8), problems(4, seed=1))
    lines = [json.loads(line) for line in (tmp_path / "k" / "metrics.jsonl").read_text().splitlines()]
    assert [line["clip_fraction_by_minibatch"][0] == 0 for line in lines] == [True, False, True, False]
    assert [line["importance_ratio_mean"] == 1 for line in lines].count(True) == 0


def test_a_reward_for_each_response_is_asked_for():
    t = trainer(reward_fn=lambda asked, responses: [1.0] * (len(responses) - 1))
    with pytest.raises(ValueError, match="^reward_fn returned 15 rewards for 16 responses: one for each$"):
        t.train_step(problems(4))


def test_unjudged_and_tied_responses_have_no_signal():
    t = trainer(reward_fn=lambda asked, _: [None, 1.0, None, None] * (len(asked) // 4), weight_decay=0.0)
    before = weights_of(t.model)
    step = t.train_step(problems(4))
    assert step["unjudged_responses"] == 12 and step["zero_variance_groups"] == 1
    assert torch.equal(weights_of(t.model), before)


@pytest.mark.parametrize("kind", [int, bool, float, np.float32, np.int64, torch.tensor])
def test_rewards_may_be_any_number(kind):
    """Checkpoints and samples.jsonl hold plain floats."""
    t = trainer(reward_fn=lambda asked, _: [kind(i % 2) for i in range(len(asked))])
    batch = t.collect(problems(4), 0)
    assert {type(sample.reward) for sample in batch.samples} == {float}
    assert t.update(batch)["reward_mean"] == 0.5


def test_the_logged_loss_is_the_one_that_is_trained(monkeypatch):
    """A loss of one's own may do anything with its gradient; what it returns is logged and looked at."""
    plain, scaled = trainer(), trainer()
    loss = scaled.algorithm.loss

    def ten_times(*arguments):
        value, metrics = loss(*arguments)
        return 10 * value, metrics

    scaled.algorithm = replace(scaled.algorithm, loss=ten_times)
    first, second = plain.train_step(problems(4)), scaled.train_step(problems(4))
    assert second["loss"] == pytest.approx(10 * first["loss"], rel=0.1) and first["loss"] != 0
    broken = trainer()
    broken.algorithm = replace(broken.algorithm, loss=lambda *a: (loss(*a)[0] * math.nan, loss(*a)[1]))
    with pytest.raises(EmergencyStop, match="loss is nan"):
        broken.train_step(problems(4))


def test_a_policy_that_was_updated_in_between_is_not_taken_for_pi_old():
    t = trainer(batch_size=2, group_size=8)
    first, second = t.collect(problems(2), 1), t.collect(problems(2, seed=1), 2)
    t.update(first)
    with pytest.raises(ValueError, match="updated between collect"):
        t.update(second)


def shift_old_log_probs(batch, shift):
    for sample in batch.samples:
        if sample.has_signal:
            sample.old_log_probs = sample.old_log_probs + shift


def test_an_update_that_was_given_up_leaves_no_gradient_behind():
    norms = []
    for spoil in (False, True):
        t = trainer(batch_size=4, mini_batch_size=4, group_size=8)
        batch = t.collect(problems(4), 0)
        if spoil:
            good = deepcopy(batch)
            shift_old_log_probs(batch, -10)
            with pytest.raises(EmergencyStop):
                t.update(batch)
            batch = good
        norms.append(t.update(batch)["grad_norm"])
    assert norms[0] == norms[1]


def test_max_length_beyond_the_models_positions_is_refused():
    with pytest.raises(ValueError, match="1024 positions"):
        trainer(max_length=1025)


def test_nothing_judged_stops_the_run():
    with pytest.raises(EmergencyStop, match="judged"):
        trainer(reward_fn=lambda asked, _: [None] * len(asked)).train_step(problems(4))


def test_a_bad_update_never_reaches_the_weights():
    t = trainer()
    batch = t.collect(problems(4), 0)
    shift_old_log_probs(batch, -10)
    before = weights_of(t.model)
    with pytest.raises(EmergencyStop, match="importance_ratio_max"):
        t.update(batch)
    next(sample for sample in batch.samples if sample.has_signal).old_log_probs[0] = math.nan
    with pytest.raises(EmergencyStop, match="nan"):
        t.update(batch)
    assert torch.equal(weights_of(t.model), before)


def test_kl_term_pulls_towards_the_start():
    """From a policy moved away from its start, with tied rewards, so that nothing but the KL term acts."""
    assert "kl" not in trainer().train_step(problems(4))
    settings = {"batch_size": 8, "mini_batch_size": 8, "learning_rate": 1e-4, "kl_coef": 1.0}
    t = trainer(reward_fn=lambda asked, _: [0.0] * len(asked), **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in t.model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    kl = [t.train_step(problems(8, seed=i))["kl"] for i in range(12)]
    assert 0 < sum(kl[-3:]) < sum(kl[:3])  # with the sign wrong it grows twentyfold


def test_prompts_without_room_are_dropped_and_reported(capsys):
    t = trainer(max_length=15)
    long = Sort("1" * 40, "1" * 40)
    assert drop_long_prompts([*problems(3), long], t.encode, t.config, "training") == problems(3)
    assert "dropped 1 of 4" in capsys.readouterr().err
    with pytest.raises(ValueError, match="shorter than every training prompt"):
        drop_long_prompts([long], t.encode, t.config, "training")


def test_training_settings_do_not_change_an_evaluation():
    asked = problems(20, seed=1)  # more than a chunk
    first = trainer(eval_samples=3).evaluate(asked)
    other = {"group_size": 6, "temperature": 0.5, "seed": 7, "batch_size": 2, "update_frequency": 2}
    assert trainer(eval_samples=3, **other).evaluate(asked) == first
    assert {round(3 * rate) / 3 for rate in first["pass_by_problem"]} == set(first["pass_by_problem"])


def test_evaluation_has_settings_of_its_own():
    """Cold samples are all alike: each problem passes with all of its samples or none."""
    asked = problems(12, seed=1)
    cold = trainer(eval_samples=3, eval_temperature=0.001).evaluate(asked)
    assert 0 < cold["pass_at_1"] < 1 and set(cold["pass_by_problem"]) == {0, 1}
    by_default = trainer(group_size=6).evaluate(asked)
    assert by_default == trainer(eval_samples=6).evaluate(asked) != cold


def test_an_evaluation_in_numbers():
    """Two problems with three samples each; None was not judged and counts as 0."""
    rollout = Rollout([1], [2, 3], [0.0, 0.0], "", True)
    rewards = [1.0, 0.5, None, -2.0, 0.0, 2.0]
    found = evaluation_metrics([Sample(None, rollout, r, passed=r == 1.0) for r in rewards], 3)
    assert found["pass_by_problem"] == [1 / 3, 0] and found["reward_by_problem"] == [0.5, 0]
    assert (found["pass_at_1"], found["reward_mean"]) == (1 / 6, 0.25)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A short run with an evaluation and a checkpoint on the way."""
    folder = tmp_path_factory.mktemp("runs")
    t = trainer(num_epochs=2, eval_frequency=3, save_frequency=2, output_dir=str(folder), run_name="run")
    result = t.train(problems(10), problems(6, seed=1))
    return t, folder / "run", result


def test_run_folder_is_complete(finished_run):
    t, run, result = finished_run
    metrics = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6] == list(range(1, t.step + 1))
    for line in metrics:
        measured = {"null_clip_fraction"} if line["step"] in (1, 4) else set()
        assert set(line) == {"step", *GLOSSARY} - {*OPTIONAL} | measured
    evaluations = lines_of(run / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    assert {"pass_at_1", "reward_mean", "interval_95"} < set(evaluations[0])
    assert result["after"]["pass_at_1"] == evaluations[-1]["pass_at_1"]
    assert json.loads((run / "config.json").read_text())["left_clip_range"] == 3e-4
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-4", "step-6"]
    samples = lines_of(run / "samples.jsonl")
    assert {sample["kind"] for sample in samples} == {"best", "worst"}
    assert all(
        best["reward"] >= worst["reward"] for best, worst in zip(samples[::2], samples[1::2], strict=True)
    )


def test_a_trained_model_has_a_card(finished_run):
    _, run, _ = finished_run
    evaluations = lines_of(run / "eval.jsonl")
    card = (run / "final_model" / "README.md").read_text()
    assert (
        f"held-out pass@1: {evaluations[-1]['pass_at_1']:.3f}" in card
        and "training: 6 rollout batches" in card
    )
    best = max(evaluations, key=lambda line: (line["pass_at_1"], line["reward_mean"]))
    card = (run / "best_model" / "README.md").read_text()
    assert f"held-out pass@1: {best['pass_at_1']:.3f}" in card
    assert f"{evaluations[0]['pass_at_1']:.3f} before training" in card
    assert f"training: {best['step']} rollout batches" in card


def test_final_model_gives_the_trainers_greedy_answers(finished_run):
    t, run, _ = finished_run
    saved = AutoModelForCausalLM.from_pretrained(run / "final_model")
    tokenizer = AutoTokenizer.from_pretrained(run / "final_model")
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems(5, seed=2)]
    greedy = Sampling(max_new_tokens=20, temperature=0.0)
    assert TransformersEngine(saved, tokenizer).generate(prompts, 1, greedy) == t.engine.generate(
        prompts, 1, greedy
    )
    ids = torch.tensor([prompts[0]])
    plain = saved.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :].tolist()
    assert plain == t.engine.generate(prompts[:1], 1, greedy)[0].response_ids


def test_the_same_seed_gives_the_same_run(finished_run, tmp_path):
    _, run, _ = finished_run
    t = trainer(num_epochs=2, eval_frequency=3, save_frequency=2, output_dir=str(tmp_path), run_name="again")
    t.train(problems(10), problems(6, seed=1))
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        assert without_seconds(lines_of(tmp_path / "again" / name)) == without_seconds(lines_of(run / name))


@pytest.mark.slow
def test_gspo_learns_to_sort_and_shuffled_rewards_do_not():
    """40 rollout batches: held-out accuracy from about .35 to above .5; the control must not rise."""

    def exact(asked, responses):
        return [float(p.answer == r) for p, r in zip(asked, responses, strict=True)]

    def shuffled(asked, responses):
        rewards = exact(asked, responses)
        return [rewards[i] for i in torch.randperm(len(rewards), generator=generator)]

    generator = torch.Generator().manual_seed(0)
    gains = []
    for reward_fn in (exact, shuffled):
        t = trainer(reward_fn=reward_fn, batch_size=32, mini_batch_size=8, group_size=8)
        t.reward_fn = exact
        before = t.evaluate(problems(64, seed=99))["pass_at_1"]
        t.reward_fn = reward_fn
        for i in range(40):
            t.train_step(problems(32, seed=i))
        t.reward_fn = exact
        gains.append(t.evaluate(problems(64, seed=99))["pass_at_1"] - before)
    print(f"gains: {gains}")
    assert gains[0] > 0.15 and gains[1] < 0.05
