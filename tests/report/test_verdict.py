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
from gspo.report.verdict import verdict
from support import ROOT

RECORDS = ROOT / "tests" / "report" / "records"
# Record: the first sentence, and what the others say.
EXPECTED = {
    "healthy": ("It learned, and no alarm was raised.", ["gain +0.", "the usual 0.1 to 0.3", "other seeds"]),
    "too_hard": (
        "Tied from the start: the problems are too hard.",
        ["100% of 20 groups", "easier --difficulty"],
    ),
    "too_easy": ("Tied from the start: the problems are too easy.", ["100% of 20 groups", "harder problems"]),
    "emergency_stop": (
        "Collapsed: emergency stop in rollout batch 1.",
        ["importance_ratio_min is 2.95e-21", "lower --learning_rate (now 1)"],
    ),
    "collapsed": (
        "Collapsed into gibberish: next to nothing was rewarded from rollout batch 2 on.",
        ["0.000 from then on and 0.500 before", "lower --learning_rate (now 1)"],
    ),
    "gibberish": (
        "Collapsed into gibberish: next to nothing was rewarded from rollout batch 2 on, emergency stop in "
        "rollout batch 6.",
        ["73% of the text is repetition, 1% at the start", "lower --learning_rate (now 0.003)"],
    ),
    "truncated": ("Responses are cut off before their end.", ["raise --max_length (now 24)"]),
    "one_update": ("nothing could clip: one update per rollout batch.", ["--mini_batch_size (now 4)"]),
    "no_difference": ("No difference seen", ["within chance", "paired over 60 problems"]),
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
