"""Validation: it must be able to fail, at the fault, and must not fail otherwise."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_loader import load_problems
from gspo.checks import losses as loss_checks
from gspo.checks import model as model_checks
from gspo.checks.report import Part, at_most, each_at_most, exactly
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
from support.faults import FAULTS, Fault

CLOSING_LINES = [
    "✅ All technical tests PASSED!",
    "✅ Training dynamics look good!",
    "✅ Performance test: PASS - Clear improvement",
    "🎉 GSPO implementation looks GOOD!",
]


def technical_part(losses, checks, model_name="tiny", until="never") -> Part:
    """losses, checks: loss_checks and model_checks, with or without a fault in what they import.

    until: a part of the name of a check; when that has failed, the others need not run.
    """
    model, tokenizer = load_model(model_name, device="cpu")
    part = Part("Technical correctness", "")
    subject = checks.ModelChecks(model, tokenizer, load_problems("sort", "eval", 8), "cpu")
    for check in [*losses.CHECKS, *subject.all()]:
        part.run(check())
        if any(until in failure.name for failure in part.failed):
            break
    return part


def tree_with(fault: Fault, folder: Path) -> Path:
    """A copy of what the checks import, with the fault in it."""
    shutil.copy(ROOT / "gspo_implementation.py", folder)
    shutil.copytree(ROOT / "gspo", folder / "gspo", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / f"{fault.module.replace('.', '/')}.py"
    source = path.read_text()
    assert source.count(fault.line) == 1, "the line has changed"
    path.write_text(source.replace(fault.line, fault.instead))
    return folder


def forget_the_package(monkeypatch) -> None:
    """The next imports are made anew, until the test ends."""
    for module in list(sys.modules):
        if module.partition(".")[0] in ("gspo", "gspo_implementation"):
            monkeypatch.delitem(sys.modules, module)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen_where_it_is(name, tmp_path, monkeypatch, capsys):
    fault = FAULTS[name]
    monkeypatch.setattr(sys, "path", [str(tree_with(fault, tmp_path)), *sys.path])
    forget_the_package(monkeypatch)
    modules = map(importlib.import_module, ("gspo.checks.losses", "gspo.checks.model"))
    part = technical_part(*modules, until=fault.seen_by)
    assert Path(sys.modules[fault.module].__file__).is_relative_to(tmp_path)
    assert any(fault.seen_by in check.name for check in part.failed), part.failed
    assert "look at: " in capsys.readouterr().out


@pytest.mark.parametrize("model_name", ["tiny", "tiny-moe"])
def test_nothing_fails_without_a_fault(model_name):
    assert technical_part(loss_checks, model_checks, model_name).failed == []


# Verdicts on training, from figures that are made up


def batch(**changes) -> dict:
    return {
        "loss": 0.0, "clip_fraction": 0.2, "clip_fraction_sequences": 0.2,
        "clip_fraction_by_minibatch": [0.0, 0.25, 0.25, 0.3], "null_clip_fraction": 0.0, "grad_norm": 1.0,
        "importance_ratio_mean": 0.999, "importance_ratio_std": 0.003, "importance_ratio_min": 0.98,
        "importance_ratio_max": 1.02, "reward_mean": 0.4, "zero_variance_groups": 0.1, "sampler_gap": 1e-6,
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


@pytest.mark.parametrize("changes, seen_by", [
    ({"clip_fraction_by_minibatch": [0.01, 0.2, 0.2, 0.2]}, "the first minibatch never clips"),
    ({"importance_ratio_std": 0.0}, "a policy that has moved"),
    ({"importance_ratio_mean": 1.5}, "ratios stay near 1"),
    ({"importance_ratio_mean": math.nan}, "ratios stay near 1"),
    ({"null_clip_fraction": 0.02}, "scored twice"),
    ({"grad_norm": math.inf}, "finite"),
    ({"clip_fraction": 0.9}, "no alarm"),
    ({"importance_ratio_max": 200.0}, "no alarm"),
    ({"clip_fraction_by_minibatch": [0.0, 0.0, 0.0, 0.0]}, "every minibatch after the first clips"),
    ({"clip_fraction": 0.01}, "healthy band"),
    ({"clip_fraction": 0.8}, "healthy band"),
    ({"clip_fraction": 0.002}, "a tenth of that"),
])  # fmt: skip
def test_unhealthy_dynamics_are_seen(changes, seen_by):
    gspo = [*GSPO[:-1], batch(**changes)] if "clip_fraction" not in changes else [batch(**changes)] * 4
    gspo = [batch(**changes)] * 4 if changes.get("clip_fraction_by_minibatch", [1])[-1] == 0 else gspo
    found = failed(movement_checks(gspo, GRPO)) + failed(clipping_checks(gspo, GRPO))
    assert any(seen_by in name for name in found), found


def evaluation(*rates: float) -> list[dict]:
    """Of 40 problems, in tens of equal pass rates."""
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
    assert failed(precision_checks({"float32, scored again": ratios[:1], "sampler's own": ratios})) == []
    assert len(failed(precision_checks({"float32, scored again": ratios}))) == 1


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


def validate(*arguments, cwd=ROOT, timeout=500) -> subprocess.CompletedProcess:
    command = [sys.executable, "validate_gspo.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("arguments, message", [
    (["--model_name", "tinny"], "did you mean tiny"),
    (["--seeds", "0"], "at least 1"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments, message, tmp_path):
    done = validate(*arguments, "--output_dir", tmp_path / "results")
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "results").exists()
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_model_of_ones_own(tmp_path):
    """The checks that make sense on it, with its tokenizer and template; no claim about its training."""
    model, tokenizer = load_model("tiny", device="cpu")
    tokenizer.chat_template = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Assistant: "
    model.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    done = validate("--model_name", tmp_path / "own", "--output_dir", tmp_path / "results")
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in CLOSING_LINES if line in done.stdout]
    assert (
        said == [CLOSING_LINES[i] for i in (0, 1, 3)] and "Performance test: not measured here" in done.stdout
    )
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["passed"] and results["model_name"] == str(tmp_path / "own")


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["tiny", "tiny-moe"])
def test_the_whole_validation(model_name, tmp_path):
    done = validate("--model_name", model_name, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line in CLOSING_LINES] == CLOSING_LINES
    assert json.loads((tmp_path / "results.json").read_text())["passed"]
    assert (tmp_path / "dynamics.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_weights_that_do_not_move_turn_every_part_red(tmp_path):
    tree = tree_with(FAULTS["weights frozen"], tmp_path)
    for name in ("validate_gspo.py", "data_loader.py"):
        shutil.copy(ROOT / name, tree)
    done = validate(cwd=tree)
    assert done.returncode == 1, done.stdout + done.stderr
    assert not any(line in done.stdout for line in CLOSING_LINES) and done.stdout.count("❌") == 4


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import os, time\nfrom concurrent.futures import ProcessPoolExecutor\nimport multiprocessing\n"
        "from gspo.checks.training import start_worker\n"
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
