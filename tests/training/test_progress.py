"""What a run shows of itself: the live line in terminals of 80 and 60 columns, log files, the time left."""

import os
import re
import sys
import time
import warnings
from contextlib import suppress
from types import SimpleNamespace

import pytest
from tqdm import tqdm

import train_gspo
from gspo import live_line
from gspo.live_line import Bar, LiveLine, fitted
from gspo.printing import duration, say
from gspo.training import progress
from gspo.training.command_line import plain_warnings
from gspo.training.config import GSPOConfig
from gspo.training.progress import TrainingLine, describe_evaluation
from support.commands import TINY
from support.metrics import EVALUATION, GOOD
from support.terminal import live_states, screen_of, written_in_terminal

FLAGS = [*TINY, "--num_epochs", "3", "--eval_frequency", "2", "--save_frequency", "2", "--batch_size", "2"]


@pytest.fixture
def at_once(monkeypatch):
    """Lines appear without delay, and each of their states is shown."""
    monkeypatch.setattr(live_line, "PROGRESS_DELAY_S", 0)
    monkeypatch.setattr(live_line, "TERMINAL_INTERVAL_S", 0)
    monkeypatch.setattr(live_line, "LOG_INTERVAL_S", 0)


@pytest.mark.parametrize("columns", [80, 60])
def test_a_run_in_a_terminal(columns, at_once, tmp_path):
    """No state of the line is wider than the terminal, and what stays on the screen are whole lines."""
    flags = [*FLAGS, "--output_dir", str(tmp_path), "--run_name", "r"]
    written = written_in_terminal(lambda: train_gspo.main(flags), columns)
    states = live_states(written)
    assert max(map(len, states)) < columns
    begun = [state for state in states if state.startswith("training ") and "left" in state]
    told = ("reward 0.", "clip 0.", "tied ", *["tokens"] * (columns == 80))
    assert len(begun) > 5 and all(figure in state for figure in told for state in begun)
    assert any(state.startswith("evaluating 4/4 problems") for state in states)
    rows = screen_of(written[written.index("run folder: ") :], columns)
    evaluations = ["step 0: held-out", *(f"step {step}: pass@1" for step in (2, 4, 6, 8, 9))]
    whole = ["run folder: ", *evaluations, "training 100%", "held-out  ", "pass@1  ", "best evaluation: "]
    assert [start for row in rows for start in whole if row.startswith(start)] == [*whole, "run folder: "]
    assert not [row for row in rows if re.search("left|evaluating|Writing", row)]


def test_a_run_in_a_log_file(at_once, tmp_path, capfd):
    assert train_gspo.main([*FLAGS, "--output_dir", str(tmp_path), "--run_name", "r"]) == 0
    said = capfd.readouterr()
    assert said.err.endswith("\n") and not re.search(r"[^\n\x20-\x7e]", said.err + said.out)
    lines = said.err.splitlines()
    assert len([line for line in lines if line.startswith("training ")]) >= 9
    assert any(line.startswith("evaluating 4/4 problems") for line in lines)
    assert "  0 s left  reward " in lines[-2] or " in all  reward " in lines[-1]
    evaluations = [line for line in said.out.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in evaluations] == [f"step {n}" for n in (0, 2, 4, 6, 8, 9)]


def test_what_is_printed_meanwhile_is_above_the_line(at_once):
    """By print() to both streams, a warning, a library's bar, and an inner bar that ends."""

    def work():
        plain_warnings()
        outer = LiveLine(lambda: ["outer line"])
        before = sys.stdout, sys.stderr
        with outer:
            outer.refresh()
            print("printed")
            with Bar(2, "inner", "steps") as inner:
                inner.update()
                print("printed to the other stream", file=sys.stderr)
                inner.update()
            warnings.warn("of \x1b[2J something", stacklevel=1)
            for _ in tqdm(range(3), desc="library"):
                outer.refresh()
            print("in two", end=" ")
            outer.refresh()
            print("parts")
        assert (sys.stdout, sys.stderr) == before

    written = written_in_terminal(work, 40)
    rows = screen_of(written, 40)
    assert "library: 100%" in rows.pop(3)
    whole = ["printed", "printed to the other stream", r"warning: of \x1b[2J something", "in two parts"]
    assert rows == whole
    assert live_states(written).count("outer line") >= 5
    assert [s.partition("  ")[0] for s in live_states(written) if "inner" in s][-1] == "inner 2/2 steps"


def test_log_lines_are_half_a_minute_apart(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with Bar(300, "outer", "steps") as outer:
        for _ in range(100):
            now[0] += 1
            with Bar(1, "inner", "steps") as inner:
                inner.update()
            outer.update()
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("  ")[0] for line in said] == [f"outer {n}/300 steps" for n in (30, 60, 90)]
    assert said[0] == "outer 30/300 steps  4 min left"


def test_bars_within_a_run_do_not_keep_it_from_its_lines(monkeypatch, capsys):
    """Each of its steps takes 40 s, most of them in a bar that has a line of its own after 30."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with LiveLine(lambda: ["outer"], stays=True) as outer:
        for _ in range(9):
            with Bar(30, "inner", "steps") as inner:
                for _ in range(30):
                    now[0] += 1
                    inner.update()
            now[0] += 10
            outer.refresh()
    said = [line.partition("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [*["inner 30/30 steps", "outer"] * 9, "outer"]


def test_what_nobody_can_read_does_not_end_a_run():
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(BrokenPipeError), os.fdopen(writer, "w") as file:
        say("step 0: ...", file)
        say("step 1: ...", file)


def test_a_narrow_terminal_shows_the_first_parts():
    assert fitted(["training 5%", "9 min left", "reward 0.5"], 35) == "training 5%  9 min left  reward 0.5"
    assert fitted(["training 5%", "9 min left", "reward 0.5"], 34) == "training 5%  9 min left"
    assert fitted(["training 5%"], 4) == "trai" and fitted([], 9) == ""
    assert [duration(s) for s in (0.4, 99, 100, 5999, 86400)] == ["0 s", "99 s", "2 min", "100 min", "24.0 h"]


# A run of 100 rollout batches of 4 queries: an evaluation every 25, which takes 120 s, a checkpoint every 10,
# a model saved with the first evaluation and at the end.
BATCH_S, EVALUATION_S, MODEL_S, CHECKPOINT_S = 10.0, 120.0, 7.0, 20.0


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("dynamic", ["off", "reward"])
def test_the_time_left_is_right_from_the_first_minutes(window, dynamic, monkeypatch):
    """window: rollout batches that are sampled together, before the first of their updates."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    config = GSPOConfig(eval_frequency=25, save_frequency=10, dynamic_sampling=dynamic)
    line = TrainingLine(config, num_queries=400, drawn=0, num_batches=100)
    metrics = GOOD | {"generation_s": 6.0, "reward_s": 1.0, "log_prob_s": 1.0, "update_s": 2.0}
    noted = {}

    def apart(kind, seconds):
        with line.time.apart(kind):
            now[0] += seconds

    def evaluate(saves):
        with line.time.apart("evaluation"):
            now[0] += EVALUATION_S
            if saves:
                apart("model", MODEL_S)

    evaluate(saves=True)
    for step in range(1, 101):
        if step % window == 1 or window == 1:
            now[0] += 0.8 * BATCH_S * window * (3 if step == 1 else 1)  # warm-up
        now[0] += 0.2 * BATCH_S
        line.note(step, metrics, drawn=4 * step, sampled=4 * (-step % window))
        noted[step] = now[0], line._ends_at
        if step == 100 or step % 25 == 0:
            evaluate(saves=False)
        if step % 10 == 0 and step < 100:
            apart("checkpoint", CHECKPOINT_S)
    apart("model", MODEL_S)
    apart("checkpoint", CHECKPOINT_S)
    line.close()
    for step, (at, ends_at) in noted.items():
        error = abs(ends_at - now[0]) / (now[0] - at)
        assert error < (0.08 if step > 1 else 1.2)  # the first one has warmed things up


def evaluation(step, passes, rewards):
    return EVALUATION | {
        "step": step, "pass_by_problem": passes, "reward_by_problem": rewards,
        "pass_at_1": sum(passes) / 2, "reward_mean": sum(rewards) / 2,
    }  # fmt: skip


def test_an_evaluation_in_a_line():
    first, last = evaluation(0, [0.0, 0.5], [0.0, 0.5]), evaluation(1000, [0.5, 1.0], [0.5, 1.0])
    assert describe_evaluation(first, first) == (
        "step 0: held-out pass@1 0.250 (95 % interval 0.100 to 0.900)"
    )
    assert describe_evaluation(last, first) == "step 1000: pass@1 0.750 (0.100 to 0.900) +0.500"
    dense = evaluation(1000, [0.5, 1.0], [1.0, 2.0])
    assert describe_evaluation(dense, first) == (
        "step 1000: pass@1 0.750 (0.100 to 0.900) +0.500, mean reward 1.5 +1.250"
    )
    assert len(describe_evaluation(dense, first)) < 80


def test_the_line_takes_no_time():
    """A thousand rollout batches, as they are noted in a log file."""
    line = TrainingLine(GSPOConfig(), num_queries=4000, drawn=0, num_batches=1000)
    with line:
        started = time.perf_counter()
        for step in range(1, 1001):
            line.note(step, GOOD, drawn=4 * step, sampled=0)
    assert time.perf_counter() - started < 0.5
