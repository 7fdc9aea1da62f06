"""A reward of one's own: what it may return, and that no misbehaviour costs more than a response."""

import json
import re
import time

import pytest

from data_loader import Problem, reward_function
from gspo.tasks import own_reward
from gspo.training.alarms import EmergencyStop
from gspo.training.training_run import TrainingRun
from support.records import lines_of
from support.sorting import problems, trainer

ASKED = [Problem(f"p{i}", "math", f"{i} + 1?", str(i + 1), {"columns": {"answer": i + 1}}) for i in range(3)]
GOOD = "def score(problem, response):\n    return float(str(problem['answer']) in response)\n"


@pytest.fixture
def write(tmp_path):
    def write(body, head=""):
        """A file whose function has this body. Returns what --reward takes."""
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        path = tmp_path / "my_rewards.py"
        path.write_text(f"{head}\ndef score(problem, response):\n{lines}\n")
        return f"{path}:score"

    return write


def rewards_of(spec, responses=("1", "2", "no")):
    return reward_function(spec)(ASKED, list(responses))


def test_a_reward_sees_all_columns_and_the_response(write):
    assert rewards_of(write("return float(str(problem['answer']) in response)")) == [1.0, 1.0, 0.0]
    seen = write(
        "assert set(problem) == {'id', 'prompt', 'answer'} and response == 'x'\nreturn len(problem['prompt'])"
    )
    assert rewards_of(seen, "xxx") == [6.0, 6.0, 6.0]


@pytest.mark.parametrize(
    ("body", "rewards"),
    [
        ("return None if response == 'no' else 2", [2.0, 2.0, None]),
        ("return {'right': response == '2', 'short': 0.5}", [{"right": False, "short": 0.5}] * 3),
        ("import numpy\nreturn numpy.float32(0.5)", [0.5] * 3),
        ("from fractions import Fraction\nreturn Fraction(1, 4)", [0.25] * 3),
        ("print('x' * 100_000)\nreturn 1", [1.0] * 3),
        ("problem.clear()\nreturn 1", [1.0] * 3),
        ("import sys\nreturn len(sys.stdin.read())", [0.0] * 3),
        ("return True", [1.0] * 3),
    ],
)
def test_what_a_reward_may_do(write, body, rewards):
    found = rewards_of(write(body))
    if isinstance(rewards[0], dict):
        assert [sum(reward.values()) for reward in found] == [0.5, 1.5, 0.5]
    else:
        assert found == rewards


def test_a_copy_of_the_worker_answers_nothing(write, monkeypatch):
    monkeypatch.setattr(own_reward, "num_workers", lambda: 1)
    reward = reward_function(write("import os\nos.fork()\nreturn float(response)"))
    assert reward(ASKED * 3, list("123456789")) == [float(i) for i in range(1, 10)]


HOSTILE = [  # what it does, and what is said of it
    ("raise RuntimeError('boom')", "my_rewards.py.*line 4.*RuntimeError: boom"),
    ("return 1 / 0", "ZeroDivisionError"),
    ("raise ValueError('\\x1b[2J \\ud800')", r"ValueError: .x1b.2J .xd800"),
    ("return '1'", "the reward is str, not a number: '1'"),
    ("return float('nan')", "not finite"),
    ("return 1e400", "not finite"),
    ("return -1e300", "too large"),
    ("return [1.0]", "the reward is list"),
    ("return {}", "an empty dict"),
    ("return {'a': 'b'}", "the part 'a' is str"),
    ("return {'1': 1, 1: 2}", "names are not all strings: '1', 1"),
    ("return 1j", "complex"),
    ("return score", "function"),
    ("raise SystemExit(0)", "SystemExit"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("return problem['nothing']", "KeyError: 'nothing'"),
    ("return score(problem, response)", "RecursionError"),
    ("return len(bytearray(10**12))", "MemoryError"),
    ("return input()", "EOFError"),
    ("import os\nos._exit(0)", "it ended its process"),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "it ended its process"),
    ("import os\nos.closerange(3, 30)\nreturn 1", "it ended its process"),
    (
        "import os, contextlib\nfor fd in range(3, 12):\n"
        "  with contextlib.suppress(OSError): os.write(fd, b'hi\\n')\nreturn 1",
        "it ended its process",
    ),
    (
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(9)\nos._exit(0)",
        "it ended its process",
    ),
    ("while True: pass", "it took too long"),
    ("import time\ntime.sleep(1000)", "it took too long"),
]


@pytest.mark.parametrize(("body", "said"), HOSTILE)
def test_no_misbehaviour_costs_more_than_its_response(write, monkeypatch, capsys, body, said):
    """On the response "no" alone. The others are judged, and the failure is shown once."""
    monkeypatch.setattr(own_reward, "TIMEOUT_S", 1.0)
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    reward = reward_function(write(f"if response == 'no':\n{lines}\nreturn 1"))
    responses = ["yes", "no", "yes"]
    assert reward(ASKED, responses) == [1.0, None, 1.0] == reward(ASKED, responses)
    counts = reward.metrics["reward_errors"], reward.metrics["reward_timeouts"]
    assert counts == ((0, 1) if "too long" in said else (1, 0))
    shown = capsys.readouterr().err
    assert shown.count("1 of 3 responses were not judged") == 1
    assert re.search(said, shown.replace("\n", " "))
    assert reward.failure in shown and "own_reward.py" not in shown


def test_a_file_that_changes_during_a_run_does_not_change_the_reward(write, monkeypatch):
    monkeypatch.setattr(own_reward, "num_workers", lambda: 1)
    reward = reward_function(write("import os\nif response == 'x': os._exit(0)\nreturn 1"))
    write("return 2")
    assert reward(ASKED, ["x", "y", "z"]) == [None, 1.0, 1.0]  # by a worker that was started anew
    assert reward_function(write("return 2"))(ASKED, ["x", "y", "z"]) == [2.0] * 3


def test_a_reward_that_always_hangs_is_not_waited_for_again_and_again(write, monkeypatch):
    monkeypatch.setattr(own_reward, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(own_reward, "num_workers", lambda: 2)
    reward, started = reward_function(write("while True: pass")), time.monotonic()
    assert reward(ASKED * 20, ["x"] * 60) == [None] * 60
    assert time.monotonic() - started < 10 and reward.metrics["reward_timeouts"] == 60


@pytest.mark.parametrize(
    ("spec", "head", "said"),
    [
        ("{file}", "", "write FILE.py:FUNCTION"),
        ("{file}:", "", "write FILE.py:FUNCTION"),
        ("nowhere.py:score", "", "there is no file"),
        ("{file}:other", "", "has no function other, but score"),
        ("{file}:score", "import nothing_like_it", "No module named 'nothing_like_it'"),
        ("{file}:score", "def (", "line 1: SyntaxError"),
        ("{file}:one", "def one(response): return 1", "one must take two arguments, problem and response"),
        ("{file}:score", "raise SystemExit(3)", "SystemExit: 3"),
        ("{file}:score", "import os; os._exit(0)", "ends its process"),
    ],
)
def test_a_file_that_does_not_work_is_refused_in_one_line(write, spec, head, said):
    file = write("return 1", head).rpartition(":")[0]
    with pytest.raises(ValueError, match=said) as refused:
        reward_function(spec.format(file=file))
    assert "\n" not in str(refused.value)


def test_a_reward_that_judges_nothing_stops_before_anything_is_on_record(write, tmp_path):
    """A mended reward then starts with an evaluation of its own."""
    settings = {"num_epochs": 1, "output_dir": str(tmp_path), "run_name": "run", "batch_size": 1}
    asked = [Problem(p.id, "exact", p.prompt, p.answer) for p in problems(12)]

    def run(body, **more):
        t = trainer(reward_fn=reward_function(write(body)), **settings, **more)
        return TrainingRun(t, asked[:8], asked[8:]).train()

    with pytest.raises(EmergencyStop, match="held-out problem could be judged") as stop:
        run("raise KeyError")
    assert "--resume" in stop.value.advice and not (tmp_path / "run" / "eval.jsonl").exists()
    # Some problems that it cannot judge do not end a run, even where a rollout batch has one problem.
    cannot_judge_some = "return None if int(problem['prompt'][0]) % 2 else float(len(response))"
    before = run(cannot_judge_some, resume="latest")["before"]
    assert before["reward_mean"] > 0
    unjudged = [line["unjudged_responses"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")]
    assert len(unjudged) == 8 and {0, 4} == set(unjudged)


def test_five_batches_without_a_judged_response_stop_with_their_evidence(write, tmp_path):
    body = "return None if int(problem['prompt'][0]) < 9 else float(len(response))"
    t = trainer(reward_fn=reward_function(write(body)), num_epochs=1, batch_size=1, output_dir=str(tmp_path),
                run_name="run")  # fmt: skip
    asked = [Problem(p.id, "exact", p.prompt, p.answer) for p in problems(80)]
    nine = [p for p in asked if p.prompt[0] == "9"]
    with pytest.raises(EmergencyStop, match="last 5 rollout batches"):
        TrainingRun(t, [p for p in asked if p not in nine][:8], nine[:2]).train()
    assert t.step == 4 and len(lines_of(tmp_path / "run" / "emergency" / "samples.jsonl")) == 4


def test_a_run_with_parts_and_failures(write, tmp_path):
    """Parts are logged as means, samples show them, config.json names the file, and the run goes on."""
    spec = write(
        "if len(response) % 2: raise RuntimeError\n"
        "return {'sorted': float(list(response) == sorted(response)), 'length': len(response) / 20}"
    )
    reward = reward_function(spec)
    t = trainer(reward_fn=reward, num_epochs=1, output_dir=str(tmp_path), run_name="run", pass_threshold=0.7)
    asked = [Problem(p.id, "exact", p.prompt, p.answer) for p in problems(12)]
    result = TrainingRun(t, asked[:8], asked[8:]).train()
    assert result["folder"] == tmp_path / "run"
    for line in lines_of(tmp_path / "run" / "metrics.jsonl"):
        parts = line["reward_part/sorted"] + line["reward_part/length"]
        assert line["reward_mean"] == pytest.approx(parts) and line["reward_timeouts"] == 0
        assert line["reward_errors"] == line["unjudged_responses"]
    assert sum(line["unjudged_responses"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")) > 0
    judged = [s for s in lines_of(tmp_path / "run" / "samples.jsonl") if s["reward"] is not None]
    assert all(s["reward"] == pytest.approx(sum(s["reward_parts"].values())) for s in judged)
    evaluation = lines_of(tmp_path / "run" / "eval.jsonl")[0]
    assert evaluation["pass_at_1"] > 0 and "reward_part/length" in evaluation
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["reward_function"] == reward.source and len(reward.source["sha256"]) == 64
    assert config["data"]["train_problems"] == 8
