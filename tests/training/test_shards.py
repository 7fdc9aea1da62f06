"""Processes with sharded weights train, sample and save as one process does."""

import json
import os
import re
import signal
import time

import pytest
import torch

from gspo.policy.model_loader import load_model
from gspo.policy.sharded_model import Sharding, shard_model
from gspo.training.adamw_8bit import MOMENT_TENSORS
from gspo.training.checkpoints import STATE_FILE
from gspo.training.whole_folders import damage
from support import one_fails, sharded
from support.commands import TINY, run_here
from support.on_ranks import exit_codes, finish, on_ranks, ranks_of, start, wait_for_line
from support.records import lines_of, record_of, without_seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it"),
]
# Passes of at most 96 tokens: more than one, and not equally many for all processes.
CASES = [
    {"name": "8 bits", "settings": {"optimizer": "adamw_8bit", "dtype": "bfloat16"}},
    {"name": "plain", "settings": {"micro_batch_tokens": 96}},
    {"name": "tied", "tied": True, "settings": {}},
    {"name": "KL, checkpointing", "settings": {"kl_coef": 0.1, "gradient_checkpointing": True}},
    {"name": "padded rows", "model": "tiny-moe", "settings": {}},
    {"name": "LoRA", "settings": {"lora_rank": 4, "learning_rate": 1e-2}},
]


def error(found, expected):
    """The relative error of tensors together."""
    difference = sum((a - b).double().square().sum() for a, b in zip(found, expected, strict=True))
    return (difference / sum(tensor.double().square().sum() for tensor in expected)).sqrt().item()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "results.pt"
    sharded.train(path, json.dumps(CASES))
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("count", (2, 3))
def test_gradients_updates_and_samples_are_those_of_one_process(one, tmp_path, count):
    cases = [case | {"settings": case["settings"] | {"shard": "full"}} for case in CASES]
    on_ranks(count, sharded.train, tmp_path / "results.pt", json.dumps(cases))
    several = torch.load(tmp_path / "results.pt", weights_only=False)
    for name, expected in one.items():
        found = several[name]
        assert found["sharded"] and not expected["sharded"]
        if name == "8 bits":  # the gradients' sum is rounded to bfloat16, and later responses differ
            assert error(found["gradients"][0], expected["gradients"][0]) < 1e-2
            continue
        assert len(found["gradients"]) == len(expected["gradients"]) > 1, name
        # In the mixture of experts, rounding adds up over the updates. It was 6e-6 when this was written.
        later = 5e-5 if name == "padded rows" else 1e-5
        for i, (a, b) in enumerate(zip(found["gradients"], expected["gradients"], strict=True)):
            assert error(a, b) < (later if i else 1e-5), (name, i)
        assert error(found["weights"], expected["weights"]) < later, name
        assert found["responses"] == expected["responses"], name
        for a, b in zip(found["metrics"], expected["metrics"], strict=True):
            # The gradients above are clipped, which hides a wrong factor.
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=later), name
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6), name
            assert a["clip_fraction_by_minibatch"] == pytest.approx(b["clip_fraction_by_minibatch"]), name
    empty = [sum(count for _, count in passes) for passes in several["tied"]["passes"]]
    assert max(empty) > 0, "a process must have had no response with a signal"


def test_a_process_whose_responses_are_all_empty_keeps_up_with_the_others(tmp_path):
    sharded.empty_responses(tmp_path / "one.pt")
    on_ranks(2, sharded.empty_responses, tmp_path / "two.pt", timeout=60)
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert error(two, one) < 1e-5


def test_experts_that_are_modules_of_their_own_are_refused():
    model = load_model("tiny", device="cpu")[0]
    model.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="--shard full: the layers of Qwen3.* have lists .*--shard none"):
        shard_model(model, Sharding(None, None))


@pytest.mark.parametrize("count", (2, 3))
def test_updates_in_8_bits_are_bit_for_bit_those_of_one_process(tmp_path, count):
    sharded.adamw_8bit(tmp_path / "one.pt")
    on_ranks(count, sharded.adamw_8bit, tmp_path / "several.pt")
    one, several = (torch.load(tmp_path / name) for name in ("one.pt", "several.pt"))
    for a, b in zip(several[0], one[0], strict=True):
        assert torch.equal(a, b)
    for index, state in one[1].items():
        assert state["step"] == several[1][index]["step"] == 3
        for name in MOMENT_TENSORS:
            assert torch.equal(state[name], several[1][index][name]), (index, name)


# ---- runs

FLAGS = [*TINY, "--num_train_samples", 9, "--mini_batch_size", 4, "--learning_rate", 1e-4, "--group_size", 4,
         "--save_frequency", 1, "--eval_frequency", 0, "--dtype", "float32"]  # fmt: skip


def assert_equal_but_for_rounding(found, expected):
    found, expected = (without_seconds(lines_of(run / "metrics.jsonl")) for run in (found, expected))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), name


def test_a_run_goes_on_with_any_number_of_processes(tmp_path):
    flags = [*FLAGS, "--output_dir", tmp_path]
    whole = start(tmp_path, *flags, "--num_epochs", 4, "--shard", "full", "--run_name", "whole")
    assert finish(whole, tmp_path)[0] == 0
    first = start(tmp_path, *flags, "--num_epochs", 1, "--shard", "full", "--run_name", "run")
    assert finish(first, tmp_path)[0] == 0
    run = tmp_path / "run"
    resumed = run_here(*flags, "--num_epochs", 2, "--resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed by 1 processes instead of 2: equal but for rounding" in resumed.stdout
    for count, epochs, shard in ((3, 3, "full"), (2, 4, "none")):
        more = ["--num_epochs", epochs, "--shard", shard, "--resume", run]
        code, said = finish(start(tmp_path, *flags, *more, count=count), tmp_path)
        assert code == 0, said
    assert_equal_but_for_rounding(run, tmp_path / "whole")
    configs = [(folder / "final_model" / "config.json").read_text() for folder in (run, tmp_path / "whole")]
    assert configs[0] == configs[1] and "FSDP" not in configs[0]


def test_a_rank_that_is_killed_while_it_saves_loses_nothing(tmp_path):
    flags = [*FLAGS, "--output_dir", tmp_path, "--num_epochs", 2, "--shard", "full"]
    whole = start(tmp_path, *flags, "--run_name", "whole")
    assert finish(whole, tmp_path)[0] == 0
    killed = start(tmp_path, "killed_in_save", *flags, "--run_name", "run", script=sharded.__file__)
    code, said = finish(killed, tmp_path)
    assert code != 0 and "exitcode  : -9" in said, said
    assert len(lines_of(tmp_path / "run" / "metrics.jsonl")) == 3
    code, said = finish(start(tmp_path, *flags, "--resume", tmp_path / "run"), tmp_path)
    assert code == 0, said
    assert record_of(tmp_path / "run") == record_of(tmp_path / "whole")


def test_a_rank_that_fails_on_its_own_work_loses_nothing(tmp_path):
    """Without a checkpoint before."""
    flags = [*FLAGS, "--output_dir", tmp_path, "--num_epochs", 1, "--shard", "full", "--save_frequency", 0,
             "--batch_size", 4]  # fmt: skip
    code, said = finish(start(tmp_path, *flags, "--run_name", "whole"), tmp_path)
    assert code == 0, said
    for where, lines in (
        ("reward", ["[rank1]: KeyError: 'a bug in the reward'",
                    "train_gspo.py: process 1 failed: KeyError: 'a bug in the reward': continue with"]),
        ("refusal", [f"[rank{rank}]: ValueError: a reward that is refused" for rank in range(2)]),
        ("sampling", ["[rank1]: RuntimeError: a bug in sampling",
                      "train_gspo.py: process 1 failed: RuntimeError: a bug in sampling: continue with"]),
        ("engine", ["train_gspo.py: the server is gone: continue with --resume"]),
        ("record", ["[rank0]: KeyError: 'a bug in the record'"]),
    ):  # fmt: skip
        log = tmp_path / f"log-{where}"
        log.mkdir()
        failed = start(log, where, *flags, "--run_name", where, script=one_fails.__file__)
        code, said = finish(failed, log)
        assert code == 1 and exit_codes(said) <= {"1", "-15"} and "1" in exit_codes(said), said
        assert all(line in said for line in lines), said
        assert "has not left" not in said, said  # it might be aborted at its end
        assert [path.name for path in (tmp_path / where / "checkpoints").iterdir()] == ["step-1"]
    code, said = finish(start(tmp_path, *flags, "--resume", tmp_path / "reward"), tmp_path)
    assert code == 0, said
    assert record_of(tmp_path / "reward") == record_of(tmp_path / "whole")


@pytest.mark.parametrize("where", ("loss", "memory"))
def test_all_end_soon_if_one_fails_in_the_middle_of_an_update(tmp_path, where):
    flags = [*FLAGS, "--output_dir", tmp_path, "--num_epochs", 1, "--shard", "full", "--run_name", "run"]
    process = start(tmp_path, where, *flags, script=one_fails.__file__)
    wait_for_line(tmp_path / "run" / "eval.jsonl", 1, process)
    begun = time.monotonic()
    code, said = finish(process, tmp_path)
    assert code == 1 and time.monotonic() - begun < 60
    assert f"[rank1]: RuntimeError: {one_fails.FAILURES[where][-1]}" in said
    assert ("--resume with --micro_batch_tokens" in said) == (where == "memory")


@pytest.mark.parametrize(
    ("where", "reason", "kept"),
    [
        ("gradient", "before the update: grad_norm is nan", ["step-1"]),
        ("weights", "1 weight tensors are not finite", []),  # which are not saved
    ],
)
def test_all_ranks_stop_before_a_bad_update_of_one(tmp_path, where, reason, kept):
    flags = [*FLAGS, "--output_dir", tmp_path, "--num_epochs", 1, "--shard", "full", "--run_name", "run",
             "--batch_size", 4]  # fmt: skip
    code, said = finish(start(tmp_path, where, *flags, script=one_fails.__file__), tmp_path)
    assert code == 1 and exit_codes(said) <= {"3", "-15"} and "3" in exit_codes(said), said
    assert said.count("emergency stop in rollout batch 2, ") == 1 and reason in said
    assert "[rank" not in said  # no traceback
    run = tmp_path / "run"
    assert len(lines_of(run / "metrics.jsonl")) == 1 and list((run / "emergency").iterdir())
    assert [path.name for path in run.glob("checkpoints/*")] == kept


def test_a_disk_that_is_full_for_one_rank_ends_all_and_the_checkpoint_before_stays(tmp_path):
    flags = [*FLAGS, "--output_dir", tmp_path, "--num_epochs", 1, "--shard", "full", "--batch_size", 4]
    code, said = finish(start(tmp_path, *flags, "--run_name", "whole"), tmp_path)
    assert code == 0, said
    (tmp_path / "log").unlink()
    process = start(tmp_path, "disk", *flags, "--run_name", "run", script=one_fails.__file__)
    code, said = finish(process, tmp_path)
    assert code == 1 and exit_codes(said) <= {"1", "-15"} and "1" in exit_codes(said), said
    assert (
        len(re.findall("^train_gspo.py: cannot write .*step-2.*; make room, then continue with", said, re.M))
        == 1
    )
    assert "[rank" not in said  # no traceback
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]
    assert damage(run / "checkpoints" / "step-1", STATE_FILE) is None
    code, said = finish(start(tmp_path, *flags, "--resume", run), tmp_path)
    assert code == 0, said
    assert record_of(run) == record_of(tmp_path / "whole")


def test_a_stop_in_the_middle_of_sampling_keeps_the_float32_weights(tmp_path):
    flags = [*FLAGS, "--output_dir", tmp_path, "--shard", "full", "--num_epochs", 2, "--save_frequency", 0]
    flags += ["--dtype", "bfloat16", "--eval_frequency", 2]
    code, said = finish(start(tmp_path, *flags, "--run_name", "whole"), tmp_path)
    assert code == 0, said
    stopped = start(tmp_path, "stopped_in_evaluation", *flags, "--run_name", "run", script=sharded.__file__)
    code, said = finish(stopped, tmp_path)
    assert code == 1 and "exitcode  : 130" in said, said
    assert [line["step"] for line in lines_of(tmp_path / "run" / "eval.jsonl")] == [0]
    code, said = finish(start(tmp_path, *flags, "--resume", tmp_path / "run"), tmp_path)
    assert code == 0, said
    # In bfloat16 the evaluations differ, since the stopped run sampled its responses in smaller batches.
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert record_of(tmp_path / "run")[name] == record_of(tmp_path / "whole")[name]


def test_others_wait_for_one_that_saves_for_long_and_end_with_one_that_dies(tmp_path):
    """The processes wait for 15 s in the middle of a computation; one save takes 20 s."""
    flags = [*FLAGS, "--output_dir", tmp_path, "--num_epochs", 30, "--shard", "full", "--run_name", "run"]
    process = start(tmp_path, "slow_to_save", *flags, script=sharded.__file__)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for_line(metrics, 3, process)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    killed = time.monotonic()
    code, said = finish(process, tmp_path)
    assert code != 0 and "exitcode  : -9" in said, said
    assert time.monotonic() - killed < 60


def test_two_machines_have_a_copy_each(tmp_path):
    flags = [*FLAGS, "--output_dir", tmp_path, "--shard", "full", "--num_epochs", 1]
    one = run_here(*flags, "--run_name", "one")
    assert one.returncode == 0, one.stderr
    launch = "--nnodes 2 --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:29517 --local_addr 127.0.0.1".split()
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    processes = [start(folder, *flags, "--run_name", "two", launch=launch) for folder in folders]
    for process, folder in zip(processes, folders, strict=True):
        code, said = finish(process, folder)
        assert code == 0, said
    assert_equal_but_for_rounding(tmp_path / "two", tmp_path / "one")
