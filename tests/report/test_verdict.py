"""The verdict on records of real runs, whole and cut short."""

import fcntl
import os
import random
import shutil
from dataclasses import replace

import pytest

from gspo.report.curves import draw_curves
from gspo.report.page import write_page
from gspo.report.run_record import read_run
from gspo.report.verdict import one_update, verdict
from support import ROOT

RECORDS = ROOT / "tests" / "report" / "records"
# Record: the first sentence, and what the others say.
EXPECTED = {
    "healthy": ("It learned, and no alarm was raised.", ["gain +0.", "the usual 0.1 to 0.4", "Other seeds"]),
    "too_hard": (
        "Every group is tied: the problems are too hard.",
        ["100% of 20 groups", "easier --difficulty", "No update was made"],
    ),
    "too_easy": ("Every group is tied: the problems are too easy.", ["100% of 20 groups", "harder problems"]),
    "emergency_stop": (
        "Collapsed: emergency stop in rollout batch 1.",
        ["importance_ratio_min is 2.95e-21", "lower --learning_rate (now 1)"],
    ),
    "collapsed": (
        "Collapsed into gibberish: next to nothing was rewarded from rollout batch 2 on.",
        [
            "0.000 from then on and 0.500 before",
            "updates of rollout batch 1",
            "lower --learning_rate (now 1)",
        ],
    ),
    "gibberish": (
        "Collapsed into gibberish: next to nothing was rewarded from rollout batch 2 on, emergency stop in "
        "rollout batch 6.",
        ["73% of the text is repetition, 1% at the start", "lower --learning_rate (now 0.003)"],
    ),
    "truncated": (
        "Responses are cut off before their end.",
        ["raise --max_length (now 24), the tokens of prompt and response together"],
    ),
    "one_update": ("nothing could clip: one update per rollout batch.", ["--mini_batch_size (now 4)"]),
    "no_difference": ("No clear difference", ["may be chance", "paired over 60 problems"]),
    "interrupted": (
        "Not known yet whether it learns",
        ["The run ended early, after rollout batch", "--resume"],
    ),
}


@pytest.fixture
def copy_of(tmp_path):
    return lambda name: shutil.copytree(RECORDS / name, tmp_path / name)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_verdict_names_the_outcome_when_it_happened_and_what_to_do(name):
    headline, *others = verdict(read_run(RECORDS / name))
    first, later = EXPECTED[name]
    assert first in headline
    text = " ".join(others)
    assert [part for part in later if part not in text] == []


def test_a_run_whose_folder_is_locked_is_still_going(copy_of):
    folder = copy_of("interrupted")
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert "The run is still going, after rollout batch" in " ".join(verdict(read_run(folder)))
    os.close(lock)
    assert "The run ended early" in " ".join(verdict(read_run(folder)))


def test_a_run_that_was_resumed_after_an_emergency_stop_is_not_stopped(copy_of):
    folder = copy_of("gibberish")
    run = read_run(folder)
    line = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line.replace('"step":5', '"step":6') + "\n")
    assert run.emergency and not read_run(folder).emergency


def test_a_gain_in_reward_alone_counts():
    """Rewards that are not 0 or 1: pass@1 stays where it is, and the mean reward rises."""
    run = read_run(RECORDS / "no_difference")
    before, after = run.evaluations[0], run.evaluations[-1]
    raised = [x + 0.1 + 0.01 * (i % 3) for i, x in enumerate(before["reward_by_problem"])]
    after = after | {"reward_by_problem": raised, "reward_mean": sum(raised) / len(raised)}
    headline, *others = verdict(replace(run, evaluations=[before, after]))
    assert headline.startswith("It learned")
    assert "Held-out mean reward went from 0.340 before training" in " ".join(others)


HALF = [0.5] * 30 + [0.25] * 30
MORE = [0.75] * 30 + [0.25] * 30


def evaluations(before, after, rewards=None):
    """Two evaluations by their passes by problem, and the rewards if these are others."""
    pairs = zip((0, 20), (before, after), rewards or (before, after), strict=True)
    return [
        {
            "step": step, "pass_at_1": sum(passes) / len(passes), "pass_by_problem": passes,
            "reward_mean": sum(earned) / len(earned), "reward_by_problem": earned, "interval_95": [0.0, 1.0],
        }
        for step, passes, earned in pairs
    ]  # fmt: skip


ALL_WRONG = {"groups_all_wrong": 1.0, "zero_variance_groups": 1.0, "reward_mean": 0.0}
UNJUDGED = {"unjudged_responses": 10**6, "reward_mean": 0.0}


@pytest.mark.parametrize(
    "changes, held_out, reason, expected",
    [
        # Training is harder than the held-out problems.
        ({"reward_mean": 0.03}, evaluations(HALF, MORE), None, "It learned"),
        # Dense rewards under the pass threshold: no group is tied.
        ({"groups_all_wrong": 1.0, "zero_variance_groups": 0.0}, evaluations(HALF, HALF), None, "No clear"),
        # Tied, and held-out pass@1 fell all the same.
        (ALL_WRONG, evaluations(MORE, HALF), None, "It got worse"),
        ({}, evaluations(MORE, HALF, (HALF, MORE)), None, "Mean reward and pass@1 went opposite ways"),
        # Two problems that changed by the same amount are no evidence.
        ({}, evaluations([0.0, 0.0], [0.1, 0.1]), None, "No clear"),
        ({}, evaluations([0.0], [1.0]), None, "Not known yet"),
        (UNJUDGED, [], "no response of the last 5 rollout batches could be judged", "Stopped"),
        ({}, [], "the reward function returned a value that is not finite", "Stopped"),
        ({}, [], "importance_ratio_max is 123, above 100", "Collapsed"),
    ],
)
def test_a_verdict_is_not_misled(changes, held_out, reason, expected):
    run = read_run(RECORDS / "healthy")
    emergency = {"step": 21, "reason": reason} if reason else {}
    metrics = [batch | changes for batch in run.metrics]
    run = replace(run, metrics=metrics, evaluations=held_out, emergency=emergency)
    headline, *others = verdict(run)
    assert headline.startswith(expected)
    if reason:
        assert ("lower --learning_rate" in others[-1]) == (expected == "Collapsed")


def test_a_stop_that_the_run_went_past_is_none(copy_of):
    """Its final evaluation stopped it, and was repeated with a better reward."""
    folder = copy_of("healthy")
    (folder / "emergency").mkdir()
    (folder / "emergency" / "metrics.json").write_text('{"step": 21, "reason": "none could be judged"}')
    assert not read_run(folder).emergency
    for odd in ("7", "[]", '{"step": null, "reason": 1}'):
        (folder / "emergency" / "metrics.json").write_text(odd)
        assert not read_run(folder).emergency


def test_warnings_are_those_that_the_run_printed():
    """From the first rollout batch with the warning to the last one without a break."""
    run = read_run(RECORDS / "healthy")
    far = [
        batch | {"importance_ratio_max": 11.0 if batch["step"] in (3, 4, 7) else 1.0} for batch in run.metrics
    ]
    found = [(a.kind, a.first, a.last) for a in replace(run, metrics=far).alarms if a.kind == "ratio"]
    assert found == [("ratio", 3, 4), ("ratio", 7, 7)]


@pytest.mark.parametrize("name", ["healthy", "gibberish"])
def test_a_report_of_a_damaged_run_renders(copy_of, tmp_path, name):
    """Files that end at any byte, as after a kill, that have a damaged byte, or that are missing."""
    folder = copy_of(name)
    whole = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    complained = 0
    for seed in range(60):
        rng = random.Random(seed)
        for path, content in whole.items():
            place = rng.randrange(len(content))
            damaged = content[:place] + rng.choice([b"", b"\x00", b"}\n", content[place + 1 :]])
            path.write_bytes(rng.choice([content, damaged]))
            if rng.random() < 0.1:
                path.unlink()
        run = read_run(folder)
        complained += bool(run.damage)
        assert verdict(run)
        write_page([run], tmp_path / "report.html")
        if seed % 30 == 0:
            draw_curves(run, tmp_path / "curves.png")
    assert complained > 20


def test_what_is_damaged_is_said(copy_of):
    folder = copy_of("healthy")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:4], lines[4][:30], *lines[5:]]) + "\n")
    run = read_run(folder)
    assert run.step == 4
    assert run.damage == [
        "metrics.jsonl, line 5: not valid JSON; the file is damaged; what follows is left out"
    ]


def test_token_clipping_and_the_samplers_pi_old_are_read_from_the_configuration():
    run = read_run(RECORDS / "one_update")
    assert one_update(run) and not run.clips_per_token
    assert not one_update(replace(run, config=run.config | {"pi_old": "sampler"}))
    assert replace(run, config=run.config | {"algorithm": "cispo", "clips_per_token": True}).clips_per_token
    assert replace(run, config=run.config | {"algorithm": "grpo"}).clips_per_token  # before it was recorded
