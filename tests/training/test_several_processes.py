"""Two real processes under torchrun train as one does, stop together, and go on exactly."""

import json
import signal

import pytest
import torch

from support.commands import TINY, run_here
from support.on_ranks import exit_codes, finish, signal_all, start, wait_for_line
from support.records import record_of, weights_of_run

FLAGS = [*TINY, "--num_train_samples", "8", "--mini_batch_size", "2", "--learning_rate", "1e-4"]
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)


DYNAMIC = ["--dynamic_sampling", "--batch_size", "2", "--mini_batch_size", "1", "--group_size", "2"]
DYNAMIC += ["--shuffle_rewards", "--algorithm", "cispo"]  # permutations and tokens are those of all processes
SHARDS = ["--shard", "full"]


@pytest.mark.parametrize(
    "more", [pytest.param([], marks=pytest.mark.slow), DYNAMIC], ids=["fixed", "dynamic"]
)
def test_two_processes_train_as_one_does(tmp_path, more):
    flags = [*FLAGS, *more, "--output_dir", tmp_path, "--run_name"]
    one = run_here(*flags, "one")
    assert one.returncode == 0, one.stderr
    assert "processes: 1" in one.stdout
    code, said = finish(start(tmp_path, *flags, "two"), tmp_path)
    assert code == 0, said
    assert said.count("processes: 2") == said.count("trained model: ") == 1  # only rank 0 prints
    assert json.loads((tmp_path / "two" / "config.json").read_text())["environment"]["processes"] == 2
    alone, together = record_of(tmp_path / "one"), record_of(tmp_path / "two")
    queries = [line["queries"] for line in alone["metrics.jsonl"]]
    assert sum(queries) == 8 and (queries == [4, 4] if not more else max(queries) > 2)
    assert together["eval.jsonl"] == alone["eval.jsonl"]
    for a, b in zip(alone["metrics.jsonl"], together["metrics.jsonl"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], SHARDS], ids=["copies", "shards"])
def test_two_processes_sample_from_one_vllm_server(tmp_path, start_vllm, more):
    server = start_vllm()
    flags = [*FLAGS, *more, "--dtype", "float32", "--rollout_engine", "vllm", "--vllm_url", server.url,
             "--output_dir", tmp_path, "--run_name"]  # fmt: skip
    code, said = finish(start(tmp_path, *flags, "two"), tmp_path)
    assert code == 0, said
    loads = server.requests["/update_weight_version"]
    assert run_here(*flags, "one").returncode == 0
    assert server.requests["/update_weight_version"] == 2 * loads  # by the main process alone
    alone, together = record_of(tmp_path / "one"), record_of(tmp_path / "two")
    assert together["eval.jsonl"] == alone["eval.jsonl"]
    for a, b in zip(alone["metrics.jsonl"], together["metrics.jsonl"], strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
    server.loads = False
    code, said = finish(start(tmp_path, *flags, "three"), tmp_path)
    assert code == 1 and said.count("stale or another model's") == 1, said


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], SHARDS], ids=["copies", "shards"])
def test_a_run_of_two_that_is_killed_and_stopped_goes_on_exactly(tmp_path, more):
    longer = [
        *FLAGS,
        *more,
        "--num_epochs",
        6,
        "--update_frequency",
        2,
        "--save_frequency",
        1,
        "--eval_frequency",
        2,
    ]
    longer += ["--output_dir", tmp_path]
    code, said = finish(start(tmp_path, *longer, "--run_name", "whole"), tmp_path)
    assert code == 0, said
    resume = ["--run_name", "stopped"]
    for number, lines in ((signal.SIGKILL, 2), (signal.SIGTERM, 4), (signal.SIGINT, 6)):
        process = start(tmp_path, *longer, *resume)
        wait_for_line(tmp_path / "stopped" / "metrics.jsonl", lines, process)
        signal_all(process, number)
        process.wait(timeout=60)
        assert not (tmp_path / "stopped" / "final_model").exists()
        resume = ["--resume", tmp_path / "stopped"]
    code, said = finish(start(tmp_path, *longer, *resume), tmp_path)
    assert code == 0, said
    assert record_of(tmp_path / "stopped") == record_of(tmp_path / "whole")
    assert weights_of_run(tmp_path / "stopped") == weights_of_run(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_probe_as_one_does(tmp_path):
    flags = [*TINY, "--mini_batch_size", 2, "--probe", "--num_train_samples", 16, "--max_new_tokens", 2]
    code, said = finish(start(tmp_path, *flags), tmp_path)
    alone = run_here(*flags)
    assert code == alone.returncode == 1 and exit_codes(said) <= {"1", "130", "-15"}

    def figures(text):
        timed = ("response tokens per s", "time of the run", "processes")
        lines = text.partition("A prompt,")[2].partition("Training would")[0].splitlines()
        return [line for line in lines if not line.startswith(timed)]

    assert figures(said) == figures(alone.stdout) != []


@pytest.mark.slow
def test_both_stop_for_gibberish_and_are_refused_alike(tmp_path):
    """The second process of a resumed run has no history, and must follow the first."""
    flags = [*FLAGS, "--learning_rate", 0.01, "--output_dir", tmp_path, "--run_name", "run"]
    code, said = finish(start(tmp_path, *flags), tmp_path)
    assert code == 0, said
    code, said = finish(start(tmp_path, "--resume", tmp_path / "run", "--num_epochs", 8), tmp_path)
    assert "before the update: gibberish" in said
    assert code == 1 and exit_codes(said) <= {"3", "-15"} and "3" in exit_codes(said)
    assert 'train_gspo.py", line' not in said  # of the tracebacks there is only the launcher's
    (tmp_path / "log").unlink()
    code, said = finish(start(tmp_path, "--resume", tmp_path / "run", "--num_epochs", 1), tmp_path)
    assert code == 1 and exit_codes(said) <= {"2", "-15"} and "the run has come further" in said
