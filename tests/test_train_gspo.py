"""The command line, through subprocess: exit codes, one-line errors, what is printed and written."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import gspo_implementation
import train_gspo
from data_loader import DATASETS, Problem, reward_function
from gspo.policy.model_loader import load_model
from gspo.training.config import GSPOConfig
from gspo.training.find_run import make_new_folder
from gspo.training.objective import describe_objective, suggested_clip_range
from gspo.training.record import GLOSSARY, OPTIONAL, glossary_table
from gspo.training.stopping import StopRequest
from gspo_implementation import ALGORITHMS, resolve
from support import ROOT
from support.commands import TINY, command, environment, exit_code_of, forked, run, run_here, wait_for
from support.models import make_model
from train_gspo import (
    algorithm_names,
    default_clip_range,
    difficulty_for,
    load_task,
    parse,
    prepare,
    resolve_for_machine,
)


def test_a_run_from_the_command_line(tmp_path):
    done = run(*TINY, "--output_dir", tmp_path, "--run_name", "r", "--batch_size", 3, "--use_wandb")
    assert done.returncode == 0, done.stderr
    for said in (
        "clipped to [1 - 0.006, 1 + 0.008]",
        "3 optimizer updates",
        "step 0: held-out pass@1 0.",
        "step 2: pass@1 0.",
        "held-out       before    after   gain, paired by problem",
        "best evaluation: ",
    ):
        assert said in done.stdout
    metrics = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    measured = {"code_timeouts", "null_clip_fraction"}
    assert len(metrics) == 2 and set(metrics[0]) == {"step", *GLOSSARY} - {*OPTIONAL} | measured
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["learning_rate"] == 1e-5 and config["difficulty"] == "easy"
    assert config["environment"]["command_line"][1:] == done.args[2:]
    for name in ("best_model", "final_model", "checkpoints/step-2"):
        assert (tmp_path / "r" / name / "model.safetensors").exists()
    assert list((tmp_path / "r" / "wandb").glob("offline-run-*"))


def evaluation(step, passes, rewards):
    """A line of eval.jsonl for problems with these pass rates and mean rewards."""
    means = {"pass_at_1": np.mean(passes), "reward_mean": np.mean(rewards), "interval_95": [0.1, 0.9]}
    return {"step": step, "pass_by_problem": passes, "reward_by_problem": rewards, **means}


def reported(capsys, before, after, best, finished=True):
    """The lines that a run prints at its end, without those that say where everything is."""
    run = SimpleNamespace(folder=SimpleNamespace(path=Path("out/r")), trainer=SimpleNamespace(step=9))
    with mock.patch.object(train_gspo, "print_verdict"):  # which reads the run's folder
        train_gspo.report(run, {"before": before, "after": after, "best": best, "finished": finished})
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if not line.startswith(("run folder", "trained model"))]


def test_the_report_of_passes(capsys):
    # differences .5, 0, .5: mean 1/3, t(2) = 4.303 times the standard error 1/6 is .717
    before, after = evaluation(0, [0.0, 0.5, 0.0], [0.0, 0.5, 0.0]), evaluation(9, [0.5] * 3, [0.5] * 3)
    assert reported(capsys, before, after, after) == [
        "held-out       before    after   gain, paired by problem",
        "pass@1          0.167    0.500   +0.333  (95 % interval -0.384 to +1.050)",
        "best evaluation: after 9 rollout batches, pass@1 0.500: out/r/best_model",
    ]


def test_the_report_of_a_dense_reward(capsys):
    before, middle = evaluation(0, [0.0] * 3, [0.0] * 3), evaluation(1, [0.0] * 3, [4.0] * 3)
    after = evaluation(2, [0.0] * 3, [1.0, 1.0, 2.0])
    # differences 1, 1, 2: mean 4/3, and 4.303 times the standard error 1/3 is 1.434
    assert reported(capsys, before, after, middle) == [
        "held-out       before    after   gain, paired by problem",
        "pass@1          0.000    0.000   +0.000  (no interval: every problem changed by the same amount)",
        "mean reward         0    1.333   +1.333  (95 % interval -0.1009 to +2.768)",
        "best evaluation: after 1 rollout batch, pass@1 0.000, mean reward 4: out/r/best_model",
    ]


def test_the_report_of_a_run_that_was_interrupted_before_training(capsys):
    before = evaluation(0, [0.5], [0.5])
    assert reported(capsys, before, before, before, finished=False) == [
        "held-out       before    after   gain, paired by problem",
        "pass@1          0.500        -   -",
        "best evaluation: before training, pass@1 0.500: out/r/best_model",
        "interrupted after rollout batch 9; continue with --resume out/r",
    ]


def test_dry_run_loads_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_here("--model_name", "smollm2-135m", "--dry_run", "--mini_batch_size", 4)
    assert done.returncode == 0, done.stderr
    assert "ratio is 1 by construction" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--dataset", "math"]], ids=["sort", "math"])
def test_the_data_seed_alone_decides_the_problems(flags, tmp_path):
    digests = {}
    for name, seeds in (("a", ["--seed", 0]), ("b", ["--seed", 1]), ("c", ["--data_seed", 1])):
        config = resolve_for_machine(
            parse([*TINY, *flags, *map(str, seeds), "--output_dir", str(tmp_path), "--run_name", name])
        )
        run = prepare(config, reward_function(), *load_task(config))
        run.close()
        digests[name] = json.loads((tmp_path / name / "config.json").read_text())["problems"]
    assert digests["a"] == digests["b"] != digests["c"]


@pytest.mark.parametrize(
    "num_problems, batch_size, mini_batch_size, num_epochs, batches, updates",
    [
        (100, 4, 1, 3, 75, 300),
        (10, 4, 1, 2, 6, 20),  # rollout batches of 4, 4 and 2 problems
        (11, 4, 2, 1, 3, 6),  # of 4, 4 and 3 problems, with 2 updates each
        (9, 4, 2, 2, 6, 10),  # of 4, 4 and 1 problems, with 2, 2 and 1 updates
        (1, 4, 1, 3, 3, 3),
        (3, 8, 8, 2, 2, 2),
    ],
)
def test_updates_are_counted(num_problems, batch_size, mini_batch_size, num_epochs, batches, updates):
    config = GSPOConfig(batch_size=batch_size, mini_batch_size=mini_batch_size, num_epochs=num_epochs)
    assert config.count_updates(num_problems) == (batches, updates)


def objective(**settings):
    config = GSPOConfig(**{"device": "cpu", "max_new_tokens": 500, **settings})
    return describe_objective(resolve(config, 1), ALGORITHMS)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, "100 problems x 1 epoch: 25 rollout batches, at most 100 optimizer updates (one without a"),
        ({"num_epochs": 3}, "100 problems x 3 epochs: 75 rollout batches, at most 300 optimizer updates"),
        (
            {"dynamic_sampling": "pass"},
            "100 problems x 1 epoch: a rollout batch draws queries until 4 groups with a signal are found, "
            "at most 32; at most 25 rollout batches, at most 100 optimizer updates",
        ),
        (
            {},
            "4 queries x 8 responses per rollout batch, 4 optimizer updates of 1 x 8 responses each; ",
        ),
        (
            {"dynamic_sampling": "reward", "mini_batch_size": 2},
            "about 4 groups x 8 responses with a signal per rollout batch, 2 optimizer updates of 2 x 8",
        ),
        (
            {"dynamic_sampling": "reward", "num_train_samples": 1, "num_epochs": 8},
            "With one optimizer update before pi_old is refreshed",  # a rollout batch ends with the epoch
        ),
        ({}, "pi_old is refreshed every rollout batch. The first"),
        ({"update_frequency": 3}, "pi_old is refreshed every 3 rollout batches. The first"),
        (
            {"num_train_samples": 1, "num_epochs": 1, "mini_batch_size": 2},
            "1 problem x 1 epoch: 1 rollout batch, at most 1 optimizer update (one without a gradient is "
            "not made). 1 query x 8 responses per rollout batch, 1 optimizer update of 1 x 8 responses each",
        ),
    ],
)
def test_the_objective_in_counts(settings, said):
    assert said in objective(**settings)


@pytest.mark.parametrize(
    "num_problems, num_epochs, update_frequency, can_clip",
    [
        (100, 3, 1, 3),
        (100, 3, 3, 11),
        (1, 3, 1, 0),  # one query and so one update per rollout batch
        (1, 3, 2, 1),
        (1, 1, 2, 0),  # the run ends before its window does
        (5, 1, 2, 4),  # rollout batches of 4 and 1 problems
        (10, 2, 3, 9),  # of 4, 4 and 2
        (10, 2, 4, 13),  # of 4, 4, 2 and 4
        (10, 1, 9, 9),
    ],
)
def test_the_objective_says_what_can_clip(num_problems, num_epochs, update_frequency, can_clip):
    said = objective(num_train_samples=num_problems, num_epochs=num_epochs, update_frequency=update_frequency)
    assert ("nothing can clip" in said) == (can_clip == 0)
    assert (f"the other {can_clip} before pi_old is refreshed can" in said) == (can_clip > 0)


@pytest.mark.parametrize(
    "algorithm, said",
    [
        ("gspo", "clipped to [1 - 0.0003, 1 + 0.0004] per response; mean over each response's tokens, then"),
        ("sapo", "(4 / tau) sigmoid(tau (w - 1)) with tau 1 for A > 0 and 1.05 for A < 0, which clips "
         "nothing; mean over each response's tokens, then over responses, no KL term. "),
        ("cispo", "capped at 1 + 4, as a constant weight of log pi; mean over all tokens of an update, no"),
        ("dppo", "more than 0.15 above pi_old's, or with A < 0 more than 0.15 below; mean over all tokens"),
    ],
)  # fmt: skip
def test_the_objective_of_each_algorithm(algorithm, said):
    described = objective(algorithm=algorithm)
    assert said in described
    assert ("cannot clip" in described) == (algorithm != "sapo")


@pytest.mark.parametrize("more", [{}, {"mini_batch_size": 4}, {"algorithm": "sapo"}])
def test_the_objective_with_the_samplers_pi_old(more):
    said = objective(pi_old="sampler", **more)
    can_clip = more.get("algorithm") != "sapo"
    assert ("all updates can clip" in said) == can_clip and ("is never exactly 1" in said) != can_clip
    assert "cannot clip" not in said and "nothing can clip" not in said


def test_the_objective_names_shuffled_rewards():
    assert "rewards are shuffled among its responses" in objective(shuffle_rewards=True)
    assert "shuffled" not in objective()


@pytest.mark.parametrize("algorithm, side", [("sapo", "left"), ("sapo", "right"), ("cispo", "left")])
def test_a_clip_range_that_an_algorithm_lacks_is_refused(algorithm, side, capsys):
    done = run_here(*TINY, "--algorithm", algorithm, f"--{side}_clip_range", 0.3, "--dry_run")
    assert done.returncode == 2
    said = f"--{side}_clip_range 0.3: {algorithm} clips nothing on that side; leave it out\n"
    assert done.stderr.endswith(said) and done.stderr.count("\n") == 1


def test_the_suggested_clip_range_by_hand():
    paper = ALGORITHMS["gspo"]
    # 2,000 tokens are 4, 100 and 200 times as many: the range is 2, 10 and sqrt(200) = 14.14 times as wide
    assert suggested_clip_range(500, paper) == pytest.approx((6e-4, 8e-4))
    assert suggested_clip_range(20, paper) == pytest.approx((3e-3, 4e-3))
    assert suggested_clip_range(10, paper) == pytest.approx((4.243e-3, 5.657e-3), rel=1e-3)
    assert suggested_clip_range(2000, paper) == suggested_clip_range(8000, paper) == (3e-4, 4e-4)


@pytest.mark.parametrize(
    "settings, is_suggested",
    [
        ({}, True),
        ({"algorithm": "gspo_token"}, True),
        ({"left_clip_range": 3e-3, "right_clip_range": 4e-3}, True),  # whatever the range in use
        ({"max_new_tokens": 501}, False),
        ({"algorithm": "grpo"}, False),  # clips each token by itself
        ({"mini_batch_size": 4}, False),  # nothing can clip
    ],
)
def test_the_objective_suggests_a_clip_range_for_short_responses(settings, is_suggested):
    said = objective(**{"max_new_tokens": 20, **settings})
    suggestion = "scaled to responses of at most 20 tokens the paper's would be about 0.003 left, 0.004 right"
    assert (suggestion in said) == ("0.0003 left and 0.0004 right" in said) == is_suggested


def test_file_dataset_and_resume(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(f'{{"question": "{i} + {i}?", "answer": "#### {2 * i}"}}\n' for i in range(12)))
    flags = [*TINY[:2], *TINY[4:], "--dataset_path", path, "--output_dir", tmp_path, "--max_length", 200]
    first = run_here(*flags, "--run_name", "r", "--num_epochs", 1)
    assert first.returncode == 0, first.stderr
    longer = run_here(*flags, "--num_epochs", 2, "--resume", "latest")
    assert longer.returncode == 0, longer.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    finished = (
        "is finished (tiny, gspo): it has trained on all 12 queries of its 2 epochs. A larger --num_epochs"
    )
    assert finished not in longer.stdout
    again = run_here("--resume", "latest", "--output_dir", tmp_path)
    assert again.returncode == 0 and finished in again.stdout
    assert (tmp_path / "r" / "metrics.jsonl").read_text().count("\n") == 4
    assert json.loads((tmp_path / "r" / "samples.jsonl").read_text().splitlines()[0])["answer"].isdigit()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="sees by /proc how far a process has come")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_while_it_still_imports(number, tmp_path):
    process = subprocess.Popen(
        command(*TINY), env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, b"")
    said = b"train_gspo.py: interrupted before training began\n"
    assert stderr == (b"" if number == signal.SIGHUP else said)  # a pipe may have lost its reader, too
    assert list(tmp_path.iterdir()) == []


def steps_of(folder):
    """Rollout batches on record, for which there must be a checkpoint."""
    steps = len((folder / "metrics.jsonl").read_text().splitlines())
    assert (folder / "checkpoints" / f"step-{steps}" / "training_state.pt").exists()
    return steps


@pytest.mark.parametrize("is_piped", [False, True])
def test_a_lost_terminal_leaves_a_checkpoint_and_exit_code_130(is_piped, tmp_path):
    """The other end of the terminal is closed, as when ssh is lost, and perhaps that of a pipe to `tee`."""
    flags = [*TINY, "--num_epochs", 100, "--output_dir", tmp_path, "--run_name", "r"]
    process, terminal = pty.fork()
    if process == 0:
        code = 1
        try:
            if is_piped:
                reader, writer = os.pipe()
                os.dup2(writer, 1), os.dup2(writer, 2)
                signal.signal(signal.SIGUSR1, lambda *_: os.close(reader))
            sys.stdout = sys.stderr = open(1, "w", buffering=1)
            code = train_gspo.main([*map(str, flags)])
        finally:
            os._exit(code)
    os.set_blocking(terminal, False)

    def has_trained():
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 1 << 16)  # a full terminal would make its writer wait
        return (tmp_path / "r" / "metrics.jsonl").exists()

    wait_for(has_trained, process)
    if is_piped:
        os.kill(process, signal.SIGUSR1)
    os.close(terminal)
    assert exit_code_of(process) == 130
    assert 0 < steps_of(tmp_path / "r") < 200


def test_nohup_goes_on_when_the_terminal_is_lost(tmp_path):
    def under_nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return train_gspo.main([*map(str, flags)])

    flags = [*TINY, "--num_epochs", 4, "--output_dir", tmp_path, "--run_name", "r"]
    process = forked(under_nohup, tmp_path / "log")
    wait_for((tmp_path / "r" / "metrics.jsonl").exists, process)
    os.kill(process, signal.SIGHUP)
    assert exit_code_of(process) == 0, (tmp_path / "log").read_text()


def test_interrupt_leaves_a_checkpoint_and_exit_code_130(tmp_path):
    flags = [*TINY, "--num_epochs", 500, "--output_dir", tmp_path, "--run_name", "r"]
    metrics, log = tmp_path / "r" / "metrics.jsonl", tmp_path / "log"
    process = forked(lambda: train_gspo.main([*map(str, flags)]), log)
    wait_for(metrics.exists, process)
    os.kill(process, signal.SIGINT)
    assert exit_code_of(process) == 130
    assert "continue with --resume" in log.read_text() and "Traceback" not in log.read_text()
    assert steps_of(tmp_path / "r") > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--algorithm", "ppo"], "gspo"),
        (["--dataset", "maths"], "math"),
        (["--code_reward", "some"], "fraction"),
        (["--group_size", "1"], "group_size must be at least 2"),
        (["--batch_size", "4", "--mini_batch_size", "3"], "does not divide"),
        (["--rollout_engine", "vllm", "--rollout_dtype", "bfloat16"], "vLLM servers sample in --dtype"),
        (["--left_clip_range", "0"], "left_clip_range must be positive"),
        (["--right_clip_range", "-0.1"], "right_clip_range must be positive"),
        (["--learning_rate", "nan"], "learning_rate must be at least 0"),
        (["--temperature", "0"], "temperature must be positive"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--no_such_flag"], "no_such_flag"),
        (["--max_length", "5"], "--max_length 5 is shorter than every training prompt"),
        (["--dataset_path", "missing.jsonl", "--dataset", "file"], "missing.jsonl"),
        (["--model_name", "tinny"], "tiny"),
        (["--model_name", "Qwen/Qwen2.5-MoE-A2.7B-Instruct"], "Qwen/Qwen1.5-MoE-A2.7B-Chat"),
        (["--model_name", "Qwen/Qwen2.5-14B-Instruct", "--dataset", "gsm8k"], "hub"),
        (["--dataset", "gsm8k"], "--dataset_path"),
        (["--rollout_engine", "vllm", "--vllm_url", "localhost"], "http://127.0.0.1:8000"),
        (["--vllm_url", "http://127.0.0.1:8000"], "--rollout_engine vllm"),
        (["--resume", "latest"], "no run in gspo_outputs"),
        (["--run_name", "../elsewhere"], "run_name"),
        (["--num_train_samples", "0"], "num_train_samples"),
        (["--max_length", "2000"], "1024 positions"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, words, tmp_path, monkeypatch, capsys):
    # In this process: twenty interpreters with torch would take minutes.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StopRequest, "on_signals", lambda _: pytest.fail("training started"))
    try:
        code = train_gspo.main([*TINY, *flags])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(said) == 1 and words in said[0], said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_model_and_a_broken_line(tmp_path):
    (tmp_path / "not_a_model").mkdir()
    done = run_here(*TINY, "--model_name", tmp_path / "not_a_model", "--output_dir", tmp_path / "out")
    assert done.returncode == 2 and "not_a_model" in done.stderr
    (tmp_path / "bad.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": \n')
    done = run_here(
        *TINY[:2], *TINY[4:], "--dataset_path", tmp_path / "bad.jsonl", "--output_dir", tmp_path / "out"
    )
    assert done.returncode == 2 and "line 2" in done.stderr


COMMANDS = """
--dataset mixed --num_train_samples 50 --num_epochs 3
--dataset math --num_train_samples 200 --num_epochs 5
--model_name Qwen/Qwen2.5-7B-Instruct --dataset gsm8k --num_train_samples 1000 --num_epochs 10 --use_wandb
--dataset gsm8k --batch_size 4 --learning_rate 1e-6
--dataset code --num_train_samples 500 --num_epochs 8 --group_size 6
--left_clip_range 2e-4 --right_clip_range 5e-4 --update_frequency 3
--max_length 1024 --batch_size 8 --mini_batch_size 2
--batch_size 2 --group_size 2
--learning_rate 5e-7
--model_name microsoft/DialoGPT-medium
--model_name Qwen/Qwen2.5-7B-Instruct --dataset gsm8k --group_size 4 --left_clip_range 3e-4 \
--right_clip_range 4e-4 --learning_rate 1e-6 --num_train_samples 2000 --num_epochs 15 \
--update_frequency 5 --use_wandb
"""


@pytest.mark.parametrize("line", COMMANDS.strip().splitlines())
def test_commands_that_people_type_parse(line):
    given = line.split()
    config = parse(given)
    for flag, value in zip(given[::2], given[1::2], strict=False):
        if flag != "--use_wandb" and not value.startswith("--"):
            assert str(getattr(config, flag[2:])) == value or float(getattr(config, flag[2:])) == float(value)


def test_flags_resolve_by_model_size_and_data():
    config = resolve_for_machine(parse(["--model_name", "smollm2-135m", "--dataset", "math"]))
    assert (config.difficulty, config.learning_rate, config.max_new_tokens) == ("easy", 1e-5, 32)
    assert (config.left_clip_range, config.right_clip_range) == (6e-3, 8e-3)
    config = resolve_for_machine(
        parse(["--model_name", "tiny", "--dataset_path", "x.jsonl", "--algorithm", "grpo"])
    )
    assert (config.dataset, config.max_new_tokens) == ("file", config.max_length)
    assert (config.left_clip_range, config.right_clip_range) == (0.2, 0.27)
    large = resolve(GSPOConfig(model_name="x"), 7_000_000_000)
    assert (large.learning_rate, large.left_clip_range, large.right_clip_range) == (1e-6, 3e-4, 4e-4)
    assert [difficulty_for(n * 1e9) for n in (0.135, 1.5, 7)] == ["easy", "medium", "hard"]


@pytest.mark.parametrize(
    "settings, parameters, ranges",
    [
        ({}, 0.135e9, (6e-3, 8e-3)),
        ({"algorithm": "gspo_token"}, 0.49e9, (6e-3, 8e-3)),
        ({}, 0.5e9, (None, None)),
        ({"algorithm": "grpo"}, 0.135e9, (0.2, 0.27)),
        ({"algorithm": "sapo"}, 0.135e9, (None, None)),
        ({"algorithm": "cispo"}, 0.135e9, (None, 4.0)),
        ({"left_clip_range": 3e-4, "right_clip_range": 4e-4}, 0.135e9, (3e-4, 4e-4)),  # as typed
        ({"left_clip_range": 3e-4}, 0.135e9, (3e-4, None)),  # the other side is then the paper's, too
    ],
)
def test_the_default_clip_range(settings, parameters, ranges):
    assert default_clip_range(GSPOConfig(**settings), parameters) == ranges


@pytest.mark.parametrize(
    "flags, mode", [([], "off"), (["--dynamic_sampling"], "reward"), (["--dynamic_sampling", "pass"], "pass")]
)
def test_dynamic_sampling_as_it_is_typed(flags, mode):
    assert parse(flags).dynamic_sampling == mode
    assert parse([*flags, "--batch_size", "8"]).batch_size == 8


def test_paths_may_be_path_objects_and_other_types_are_named():
    assert GSPOConfig(output_dir=Path("a") / "b").output_dir == "a/b"
    assert GSPOConfig(learning_rate=1).learning_rate == 1
    config = GSPOConfig(learning_rate=np.float64(1e-4), batch_size=np.int64(4), kl_coef=np.float32(0.5))
    assert json.loads(json.dumps(asdict(config)))["batch_size"] == 4 and type(config.kl_coef) is float
    with pytest.raises(ValueError, match="--seed must be int, got 1.5"):
        GSPOConfig(seed=1.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_bad_input():
    with pytest.raises(ValueError, match="finds no GPU"):
        resolve(GSPOConfig(device="cuda"), 1)


def test_help_groups_every_flag_with_choices_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for f in fields(GSPOConfig):
        assert f"--{f.name}" in shown
        if f.default is not None and not isinstance(f.default, bool):
            assert f"(default: {f.default})" in shown
    assert f"or one of {', '.join(DATASETS)}" in shown
    assert f"--algorithm {{{','.join(ALGORITHMS)}}}" in shown
    assert all(f" {group}: --" in shown for group in ("model", "data", "objective", "training", "run"))


def test_help_and_a_mistyped_flag_are_answered_without_torch():
    """Importing torch alone takes seconds."""
    code = (
        "import sys, train_gspo\n"
        "try:\n    train_gspo.main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules, 'numpy' in sys.modules)\n"
    )
    for flag, expected in (("--help", 0), ("--modle_name", 2)):
        done = subprocess.run([sys.executable, "-c", code, flag], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"{expected} False False", done.stderr


def test_the_docs_glossary_is_the_one_in_use():
    assert glossary_table() in (ROOT / "docs" / "metrics.md").read_text()


def test_the_loss_in_the_docs_is_one_entry_in_one_file(tmp_path, monkeypatch):
    """docs/extending.md: its lines in gspo_implementation.py, and nothing else, make an algorithm."""
    section = (ROOT / "docs" / "extending.md").read_text().partition("## A loss\n")[2].partition("\n## ")[0]
    example = section.partition("```python\n")[2].partition("```")[0]
    # The flags are made from the file, the trainer from the module: add the example to both.
    source = (ROOT / "gspo_implementation.py").read_text()
    (tmp_path / "gspo_implementation.py").write_text(f"{source}\n\n{example}")
    monkeypatch.setattr(train_gspo, "__file__", str(tmp_path / "train_gspo.py"))
    monkeypatch.setattr(gspo_implementation, "ALGORITHMS", dict(ALGORITHMS))
    exec(example, vars(gspo_implementation))
    assert algorithm_names() == tuple(gspo_implementation.ALGORITHMS) == (*ALGORITHMS, "better_half")
    flags = [*TINY, "--algorithm", "better_half", "--run_name", "r", "--output_dir", tmp_path]
    done = run_here(*flags)
    assert done.returncode == 0, done.stderr
    assert "better_half: sequence ratio of the better half, clipped to [1 - 0.0003" in done.stdout
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert (config["algorithm"], config["right_clip_range"]) == ("better_half", 4e-4)


def test_algorithm_names_are_those_of_the_table():
    assert algorithm_names() == tuple(ALGORITHMS)


def test_two_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "now")
    for _ in range(2):
        assert run_here(*TINY, "--output_dir", tmp_path, "--seed", 3).returncode == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tiny-gspo-seed3-now", "tiny-gspo-seed3-now-2"}


def test_folders_made_at_once_are_never_the_same(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(make_new_folder, [tmp_path / "new" / "run"] * 40))
    assert sorted(made) == sorted((tmp_path / "new").iterdir()) and len(set(made)) == 40
    assert {path.name for path in made} == {"run", *(f"run-{i}" for i in range(2, 41))}


def test_a_learning_rate_of_zero_is_a_control(tmp_path):
    done = run_here(*TINY, "--learning_rate", 0, "--output_dir", tmp_path, "--run_name", "r")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r" / "config.json").read_text())["learning_rate"] == 0
    trained, initial = load_model(str(tmp_path / "r" / "final_model")), load_model("tiny")
    assert all(map(torch.equal, trained[0].parameters(), initial[0].parameters()))


def test_prompts_that_the_tokenizer_cannot_read_are_warned_of(capsys):
    tokenizer = load_model("tiny")[1]
    capsys.readouterr()  # a progress bar, unless another test has turned them off

    def warning(model_name, dataset, *prompts):
        config = GSPOConfig(model_name=model_name, dataset=dataset)
        problems = [Problem("", "exact", prompt, "") for prompt in prompts]
        train_gspo.warn_of_unreadable_prompts(tokenizer, config, problems)
        return capsys.readouterr().err

    assert warning("own", "file", "123=", "\u00e9\u00e8\u00ea") == warning("tiny", "sort", "12=") == ""
    unknown = warning("own", "file", "12=", "\u00e9\u00e8\u00ea\u00eb")
    assert "57% of the prompts' tokens are unknown" in unknown
    assert "tiny has learned to sort digits" in warning("tiny", "math", "What is 1 + 2?")


def test_dialogpt_shape_without_a_chat_template_trains(tmp_path):
    """GPT-2 with learned positions, dropout and a plain prompt, from a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = make_model("gpt2")
    vocabulary = {character: i + 3 for i, character in enumerate("0123456789=QuestionAwr: \n+?.")}
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "<e>": 2, **vocabulary}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<e>")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    done = run_here(
        *TINY, "--model_name", tmp_path / "model", "--output_dir", tmp_path / "out", "--max_length", 60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset", "maths"], "unknown data set 'maths'"),
        (["--dataset_path", "nowhere.jsonl"], "nowhere.jsonl is not there"),
        (["--dataset", "sort", "--max_length", "5"], "shorter than every training prompt"),
        (["--dataset", "math", "--num_train_samples", "2000000"], "the most that are generated"),
        (["--dataset", "sort", "--reward", "nowhere.py:score"], "there is no file"),
        (["--dataset", "sort", "--chat_template_kwargs", "[1]"], "must be a JSON object"),
        (["--dataset", "sort", "--prompt_suffix", "x"], "go with data of your own"),
        (["--dataset", "reasoning_gym:nothing"], "no generator 'nothing'"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would_refuse(flags, said, capsys):
    assert train_gspo.main(["--model_name", "tiny", "--dry_run", *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_gspo.py: ")]
    assert said in line


def test_a_dry_run_needs_no_more_of_a_model_than_its_configuration(tmp_path, capsys):
    config = make_model("qwen3").config
    config.save_pretrained(tmp_path / "plan")
    command = ["--model_name", str(tmp_path / "plan"), "--dataset", "sort", "--dry_run", "--max_length"]
    assert train_gspo.main([*command, str(config.max_position_embeddings)]) == 0
    assert "the prompts' lengths are not checked" in capsys.readouterr().out
    assert train_gspo.main([*command, "100000"]) == 2
    assert "--max_length 100000 is beyond the model's" in capsys.readouterr().err
