"""Validation must be able to fail, at the fault, and must not fail otherwise."""

import importlib
import json
import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

import validate_gspo
from data_loader import load_problems
from gspo.checks import losses as loss_checks
from gspo.checks import model as model_checks
from gspo.checks import validation
from gspo.checks.model import largest_null_clip_fraction
from gspo.checks.report import Checks, Part, at_most, each_at_most, exactly
from gspo.checks.training import (
    SORTING,
    Run,
    clip_range_checks,
    clipping_checks,
    movement_checks,
    performance_checks,
    precision_checks,
    reward_function,
    share_outside,
)
from gspo.policy.model_loader import load_model
from support import ROOT
from support.faults import FAULTS, import_with, plant

CLOSING_LINES = [
    "✅ All technical tests PASSED!",
    "✅ Training dynamics look good!",
    "✅ Performance test: PASS - Clear improvement",
    "🎉 GSPO implementation looks GOOD!",
]


@pytest.fixture(scope="module")
def tiny():
    """The model and tokenizer of every test here; copy the model before changing it."""
    return load_model("tiny", device="cpu")


@pytest.fixture
def anew():
    """In the test, our modules are imported anew. After it, they are what they were before."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in ("gspo", "gspo_implementation")]

    before = {name: sys.modules.pop(name) for name in ours()}
    yield
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


def all_checks(losses: ModuleType, model: ModuleType, loaded) -> list[Callable[[], Checks]]:
    """Part 1's generators of checks. losses, model: the modules, with or without a fault in their imports."""
    policy, tokenizer = loaded
    problems = load_problems("sort", "eval", 8)
    return [*losses.CHECKS, *model.ModelChecks(deepcopy(policy), tokenizer, problems, "cpu").all()]


def name_of(checks: Callable) -> str:
    return checks.func.__name__ if isinstance(checks, partial) else checks.__name__


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen_where_it_is(name, tiny, anew, capsys):
    fault = FAULTS[name]
    import_with(name)
    modules = map(importlib.import_module, ("gspo.checks.losses", "gspo.checks.model"))
    chosen = [checks for checks in all_checks(*modules, tiny) if name_of(checks) == fault.checks]
    assert chosen, f"no generator of checks is named {fault.checks}"
    part = Part("Technical correctness", "")
    seen = False
    for checks in chosen:
        part.run(checks())
        seen = any(fault.seen_by in check.name for check in part.failed)
        if seen:
            break
    assert seen, part.failed
    assert "look at: " in capsys.readouterr().out


def test_a_fault_that_does_not_fit_the_code_is_named(monkeypatch):
    fault = FAULTS["top-k"]
    for changes, message in (
        ({"place": "draw_tokenz"}, "'top-k': gspo.policy.rollout has no draw_tokenz"),
        ({"text": "no such line"}, "'top-k': draw_tokens in gspo.policy.rollout must have this text once"),
        ({"text": "logits"}, "and has it [0-9]* times"),
    ):
        monkeypatch.setitem(FAULTS, "top-k", fault._replace(**changes))
        with pytest.raises(LookupError, match=message):
            plant("top-k")


def test_no_check_of_losses_fails_without_a_fault():
    assert [failed(checks()) for checks in loss_checks.CHECKS] == [[]] * len(loss_checks.CHECKS)


def test_no_check_of_a_model_fails_without_a_fault():
    """The slow test of the whole validation says the same of the mixture of experts."""
    model, tokenizer = load_model("tiny", device="cpu")
    subject = model_checks.ModelChecks(model, tokenizer, load_problems("sort", "eval", 8), "cpu")
    for checks in subject.all():
        assert failed(checks()) == [], name_of(checks)


# A loss that is added to the table


def added(monkeypatch, loss: Callable, reference: str | None) -> list[str]:
    """Names of the checks of losses that fail when ALGORITHMS has this loss, too, with GRPO's settings."""
    entry = replace(loss_checks.ALGORITHMS["grpo"], loss=loss, reference=reference)
    monkeypatch.setitem(loss_checks.ALGORITHMS, "new", entry)
    part = Part("Losses", "")
    for checks in loss_checks.CHECKS:
        part.run(checks())
    return [check.name for check in part.failed]


def test_an_added_loss_is_checked_like_the_others(monkeypatch):
    grpo = loss_checks.loss_of("grpo")

    def wrong_sign(*arguments):
        loss, metrics = grpo(*arguments)
        return -loss, metrics

    def no_denominator(*arguments):
        return grpo(*arguments[:6])

    assert added(monkeypatch, grpo, "grpo") == []
    assert added(monkeypatch, wrong_sign, "grpo") == [
        "the loss equals a float64 loop over the paper's formula", "so does its gradient",
    ]  # fmt: skip
    assert added(monkeypatch, no_denominator, "grpo") == ["micro-batches of 1, 2 or 5 add up to the whole"]


@pytest.mark.parametrize("reference", [None, "no_such_function"])
def test_an_added_loss_without_a_reference_fails(monkeypatch, tiny, reference):
    failure = "new: there is a float64 reference to compare it with"
    assert added(monkeypatch, loss_checks.loss_of("grpo"), reference) == [failure]
    subject = model_checks.ModelChecks(*tiny, load_problems("sort", "eval", 8), "cpu")
    assert failed(subject.trainer_updates("new")) == [failure]


# Checks of training, with figures that are made up


def batch(**changes) -> dict:
    return {
        "loss": 0.0, "clip_fraction": 0.2, "clip_fraction_sequences": 0.2,
        "clip_fraction_by_minibatch": [0.0, 0.25, 0.25, 0.3], "null_clip_fraction": 0.0, "grad_norm": 1.0,
        "importance_ratio_mean": 0.999, "importance_ratio_std": 0.003, "importance_ratio_min": 0.98,
        "importance_ratio_max": 1.02, "reward_mean": 0.4, "zero_variance_groups": 0.1, "sampler_gap": 1e-6,
        "eligible_fraction": 0.7, "clip_fraction_eligible": 0.3, "ratio_spread": 3.0,
    } | changes  # fmt: skip


GSPO = [batch() for _ in range(4)]
TOKENS = {"importance_ratio_std": 0.2, "importance_ratio_min": 0.05, "importance_ratio_max": 3.0}
GRPO = [
    batch(clip_fraction=0.001, clip_fraction_by_minibatch=[0.0, 0.001, 0.001, 0.002], **TOKENS)
    for _ in range(4)
]


def failed(checks) -> list[str]:
    return [check.name for check in checks if not check.passed]


def test_healthy_dynamics_pass():
    assert failed(movement_checks(GSPO, GRPO)) == failed(clipping_checks(GSPO, GRPO)) == []


@pytest.mark.parametrize("changes, number_of_batches, seen_by", [
    ({"clip_fraction_by_minibatch": [0.01, 0.2, 0.2, 0.2]}, 1, "the first minibatch never clips"),
    ({"importance_ratio_std": 0.0}, 1, "a policy that has moved"),
    ({"importance_ratio_mean": 1.5}, 1, "ratios stay near 1"),
    ({"importance_ratio_mean": math.nan}, 1, "ratios stay near 1"),
    ({"null_clip_fraction": 0.02}, 1, "log-probs taken twice"),
    ({"grad_norm": math.inf}, 1, "finite"),
    ({"clip_fraction": 0.9}, 4, "no alarm"),
    ({"importance_ratio_max": 200.0}, 1, "no alarm"),
    ({"clip_fraction_by_minibatch": [0.0, 0.0, 0.0, 0.0]}, 4, "every minibatch after the first clips"),
    ({"clip_fraction": 0.01}, 4, "healthy band"),
    ({"clip_fraction": 0.8}, 4, "healthy band"),
    ({"clip_fraction": 0.002}, 4, "a tenth of that"),
])  # fmt: skip
def test_unhealthy_dynamics_are_seen(changes, number_of_batches, seen_by):
    gspo = GSPO[number_of_batches:] + [batch(**changes)] * number_of_batches
    found = failed(movement_checks(gspo, GRPO)) + failed(clipping_checks(gspo, GRPO))
    assert any(seen_by in name for name in found), found


def test_null_clip_fraction_is_taken_from_the_batches_that_measured_it():
    assert largest_null_clip_fraction([{}, {"null_clip_fraction": 0.5}, {}]) == 0.5
    assert math.isnan(largest_null_clip_fraction([{}, {}]))  # which passes no check


def evaluation(*rates: float) -> list[dict]:
    """The evaluation of 40 problems with four pass rates, ten problems each."""
    return [{"pass_at_1": sum(rates) / 4, "pass_by_problem": [rate for rate in rates for _ in range(10)]}]


START, BETTER, A_LITTLE = (
    evaluation(0, 0.25, 0.5, 0.5),
    evaluation(0.25, 0.5, 0.5, 1),
    evaluation(0, 0.25, 0.5, 0.52),
)


@pytest.mark.parametrize("after, control, number_failed", [
    (BETTER, START, 0),
    (START, START, 2),  # nothing was learnt
    (A_LITTLE, START, 2),  # not enough
    (BETTER, BETTER, 2),  # so does a run without a signal
    (evaluation(0, 0, 0.25, 0.25), START, 2),
])  # fmt: skip
def test_performance_passes_only_on_a_clear_gain_over_a_control(after, control, number_failed):
    assert len(failed(performance_checks(START, after, control))) == number_failed


def test_clip_ranges_must_matter():
    def runs(*fractions):
        return {str(i): [batch(clip_fraction=x)] for i, x in enumerate(fractions)}

    assert failed(clip_range_checks(runs(0.36, 0.34, 0.3, 0.2, 0.001))) == []
    assert len(failed(clip_range_checks(runs(0.3, 0.3, 0.3, 0.3, 0.3)))) == 1
    assert len(failed(clip_range_checks(runs(0.0, 0.0, 0.0, 0.0, 0.0)))) == 1
    assert len(failed(clip_range_checks(runs(0.001, 0.2, 0.3, 0.3, 0.36)))) == 3


def test_null_clip_fraction_counts_tokens_outside():
    ratios = [(1.0, 10), (1.00035, 5), (0.9996, 5)]
    assert share_outside(ratios, 3e-4, 4e-4) == 0.25
    assert share_outside(ratios, 1e-6, 1e-6) == 0.5
    assert failed(precision_checks({"float32, computed again": ratios[:1], "sampler's own": ratios})) == []
    assert len(failed(precision_checks({"float32, computed again": ratios}))) == 1


def test_shuffled_rewards_are_the_same_rewards():
    problems = load_problems("sort", "train", 50)
    responses = [p.answer if i % 3 else "0" for i, p in enumerate(problems)]
    plain, shuffled = (
        reward_function(Run("tiny", SORTING, 0, rewards=kind))(problems, responses)
        for kind in ("task", "shuffled")
    )
    assert sorted(plain) == sorted(shuffled) and plain != shuffled


def test_a_check_that_raises_has_failed_and_nan_is_no_small_error(capsys):
    def checks():
        yield exactly("one", 1, 1, "value", "")
        raise ZeroDivisionError("ha")

    part = Part("Title", "closing line").close()
    assert "closing line" not in capsys.readouterr().out  # nothing was measured
    part.run(checks())
    part.close()
    assert [check.name for check in part.failed] == ["checks"]
    printed = capsys.readouterr().out
    assert 'test_validate.py", line' in printed and "1 of 2 FAILED: checks" in printed
    assert at_most("x", math.nan, 1, "", "").passed is False
    assert each_at_most("x", {"a": 0.0, "b": math.nan}, 1, "error", "there").fault == "b: there"


# The command


def validate(*arguments, cwd=ROOT, **variables) -> subprocess.CompletedProcess:
    command = [sys.executable, "validate_gspo.py", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("arguments, code, message", [
    (["--help"], 0, "--model_name"),
    (["--sedes", "2"], 2, "unrecognized arguments: --sedes"),
    (["--seeds", "0"], 2, "at least 1"),
])  # fmt: skip
def test_flags_are_read_before_torch_is_imported(arguments, code, message, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = validate(*arguments, "--output_dir", tmp_path / "results", PYTHONPATH=str(tmp_path))
    assert done.returncode == code and message in done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == (code != 0)
    assert not (tmp_path / "results").exists()


def test_an_unknown_model_is_one_line(tmp_path, capsys):
    assert validate_gspo.main(["--model_name", "tinny", "--output_dir", str(tmp_path / "results")]) == 2
    said = capsys.readouterr().err
    assert "did you mean tiny" in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "results").exists()


class InThisProcess:
    """Stands in for the pool of worker processes, which take longer to start than the rest of the test."""

    def __init__(self, *_) -> None:
        pass

    def submit(self, function, *arguments) -> Future:
        function, arguments = pickle.loads(pickle.dumps((function, arguments)))
        future = Future()
        future.set_result(pickle.loads(pickle.dumps(function(*arguments))))
        return future

    def shutdown(self, **_) -> None:
        pass


def test_a_model_of_ones_own(tiny, tmp_path, monkeypatch, capsys):
    """The checks make sense on it, with its tokenizer and template; nothing is said of its training."""
    monkeypatch.setattr("gspo.checks.training.ProcessPoolExecutor", InThisProcess)
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "own")
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Assistant: "
    tokenizer.save_pretrained(tmp_path / "own")
    arguments = ["--model_name", tmp_path / "own", "--output_dir", tmp_path / "results"]
    code, said = validate_gspo.main(list(map(str, arguments))), capsys.readouterr().out
    assert code == 0, said
    expected = [*CLOSING_LINES[:2], "Performance test: not measured here", CLOSING_LINES[3]]
    assert [line for line in said.splitlines() if line in expected] == expected
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["passed"] and results["model_name"] == str(tmp_path / "own")


@pytest.mark.slow
def test_the_whole_validation(tmp_path):
    done = validate("--output_dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_all_is_well(done.stdout, tmp_path)


@pytest.mark.slow
def test_validation_of_a_mixture_of_experts(tmp_path, monkeypatch, capsys):
    """All of its checks and runs, with half of the training and of the held-out problems."""
    monkeypatch.setattr(validation, "SORTING", replace(SORTING, num_batches=8, num_eval=128))
    code = validate_gspo.main(["--model_name", "tiny-moe", "--output_dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert code == 0, said
    assert_all_is_well(said, tmp_path)


def assert_all_is_well(said: str, folder: Path) -> None:
    assert [line for line in said.splitlines() if line in CLOSING_LINES] == CLOSING_LINES
    assert json.loads((folder / "results.json").read_text())["passed"]
    assert (folder / "dynamics.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_weights_that_do_not_move_turn_every_part_red(anew, tiny, tmp_path, monkeypatch, capsys):
    """Two rollout batches are enough to see it."""
    import_with("weights frozen")
    faulty = importlib.import_module("gspo.checks.validation")
    monkeypatch.setattr("gspo.checks.training.ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(faulty, "SORTING", replace(faulty.SORTING, num_batches=2, num_eval=16))
    passed = faulty.validate("tiny", *deepcopy(tiny), range(1), tmp_path)
    said = capsys.readouterr().out
    assert not passed and said.count("❌") == 4, said
    assert not any(line in said for line in CLOSING_LINES)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import os, time\nfrom concurrent.futures import ProcessPoolExecutor\nimport multiprocessing\n"
        "from gspo.checks.worker import start_worker\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), start_worker, (1,))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
