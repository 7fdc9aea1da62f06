"""Training on what vLLM servers sample: weights, masks, faults, a server of the run's own. They are fake."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch

from gspo.checks import float64_reference as reference
from gspo.policy import vllm_guard, vllm_process
from gspo.policy.known_models import EMBEDDED_NAME, known_config
from gspo.policy.model_loader import load_model
from gspo.policy.rollout import Rollout
from gspo.policy.vllm_engine import VLLMEngine
from gspo.policy.vllm_process import ServerSettings, server_command, server_variables
from gspo.policy.vllm_server import EngineError
from gspo.training import rollout_engine, weights_folder
from gspo.training.alarms import EmergencyStop, mismatch_reason
from gspo.training.hardware import machine_for
from gspo.training.mismatch import mismatch
from gspo.training.plan import plan_training, with_method
from gspo.training.rollout_batch import Sample
from gspo_implementation import ALGORITHMS, GSPOConfig
from support import ROOT
from support.commands import TINY, command, environment, run, run_here
from support.records import lines_of, without_seconds
from support.sorting import problems, trainer, weights_of

EXACT = 1e-4  # nats per token: what rounding in float32 stays far below


@pytest.fixture
def start(start_vllm, monkeypatch):
    """Returns a function that starts a fake server, whose death is noticed soon."""
    monkeypatch.setattr(rollout_engine, "VLLMEngine", partial(VLLMEngine, start_timeout_s=2.0))
    return start_vllm


def with_servers(*servers, **settings):
    urls = ",".join(server.url for server in servers)
    return trainer(rollout_engine="vllm", vllm_url=urls, **settings)


@pytest.mark.parametrize("lora_rank", (0, 4))
def test_every_rollout_batch_is_sampled_from_the_present_weights(start, lora_rank):
    servers = start(), start()
    settings = {"lora_rank": lora_rank, "learning_rate": 2e-3} if lora_rank else {}
    t = with_servers(*servers, batch_size=4, mini_batch_size=2, **settings)
    for seed in range(3):
        metrics = t.train_step(problems(4, seed=seed))
        assert metrics["sampler_gap_max"] < EXACT
        assert metrics["sampler_ess"] == pytest.approx(1, abs=1e-4) and metrics["masked_fraction"] == 0
        assert metrics["clip_fraction_by_minibatch"][0] == 0 < metrics["grad_norm"]
    t.evaluate(problems(2, seed=9))
    loaded = [server.requests["/v1/load_lora_adapter" if lora_rank else "/update_weight_version"]
              for server in servers]  # fmt: skip
    assert loaded == [4, 4], (
        "once for each version, the start and the evaluation after the last update included"
    )
    if lora_rank:
        assert [len(server.adapted) for server in servers] == [1, 1], "older ones are dropped"
    folder = t.engine._folder.path
    assert [path.name for path in folder.glob("*/")] == ["4"]
    t.engine.close()
    assert not folder.exists()


def test_k_rollout_batches_of_one_pi_old_take_one_set_of_weights(start, tmp_path):
    server = start()
    t = with_servers(
        server, update_frequency=2, batch_size=2, eval_frequency=0, output_dir=str(tmp_path), run_name="r"
    )
    t.train(problems(8), problems(2, seed=1))
    assert server.requests["/update_weight_version"] == 3, "the start, the second window and the end"
    assert all(line["sampler_gap"] < EXACT for line in lines_of(tmp_path / "r" / "metrics.jsonl"))


def test_a_first_minibatch_has_ratios_of_exactly_1(start):
    metrics = with_servers(start(), batch_size=2, mini_batch_size=2).train_step(problems(2))
    assert metrics["importance_ratio_min"] == metrics["importance_ratio_max"] == 1


# ---- engines that are wrong


def stale(server):
    server.loads = False


def cut_to_top_p(server):
    server.top_p = 0.8


def without_temperature(server):
    server.without_temperature = True


@pytest.mark.parametrize(
    ("fault", "message"),
    (
        (stale, "stale or another model's"),
        (cut_to_top_p, "top-p, top-k or min-p"),
        (without_temperature, "those without temperature"),
    ),
)
def test_a_wrong_engine_makes_no_update(start, fault, message):
    """The first weights are right; the fault comes with the second ones."""
    server = start()
    t = with_servers(server, batch_size=2, learning_rate=3e-3)
    t.train_step(problems(2))
    before = weights_of(t.model)
    fault(server)
    with pytest.raises(EngineError, match=message):
        t.train_step(problems(2, seed=1))
    assert torch.equal(weights_of(t.model), before)


def test_weights_that_stay_behind_are_noticed_by_the_growth_of_the_gap(start, monkeypatch):
    server = start()
    monkeypatch.setitem(rollout_engine.compare.__globals__["TOLERANCE"], "float32", 10.0)
    t = with_servers(server, batch_size=2, learning_rate=3e-3)
    t.train_step(problems(2))
    server.loads = False
    with pytest.raises(EngineError, match="with the first weights .*: its weights stay behind"):
        t.train_step(problems(2, seed=1))


def test_weights_that_go_astray_between_checks_make_no_update(start):
    server = start()
    t = with_servers(server, batch_size=2)
    t.engine.sync("0")
    with torch.no_grad():
        for weights in server.model.parameters():
            weights += 0.1 * weights.std(correction=0) * torch.randn_like(weights)
    before = weights_of(t.model)
    with pytest.raises(EngineError, match="stale or another model's"):
        t.train_step(problems(2))
    assert torch.equal(weights_of(t.model), before)


def test_a_dead_server_ends_the_run_and_resume_loses_nothing(start, tmp_path):
    flags = [*TINY, "--dtype", "float32", "--output_dir", tmp_path, "--rollout_engine", "vllm",
             "--batch_size", 2, "--learning_rate", 1e-3]  # fmt: skip
    whole = start()
    assert run_here(*flags, "--vllm_url", whole.url, "--run_name", "whole").returncode == 0
    server = start()
    answer, dead = server.answer, []

    def die_in_the_second_batch(path, body):
        dead.extend(["dead"] * (server.generated == 15))
        if dead:
            raise ConnectionError
        return answer(path, body)

    server.answer = die_in_the_second_batch
    done = run_here(*flags, "--vllm_url", server.url, "--run_name", "killed")
    folder = tmp_path / "killed"
    assert done.returncode == 1
    assert f"{server.url}: not there for 2 s" in done.stderr and f"--resume {folder}" in done.stderr
    assert done.stderr.count("\n") < 4 and "Traceback" not in done.stderr
    other = start()  # at another address
    done = run_here("--resume", folder, "--vllm_url", other.url)
    assert done.returncode == 0, done.stderr
    for stream in ("metrics", "eval", "samples"):
        found, expected = (lines_of(tmp_path / name / f"{stream}.jsonl") for name in ("killed", "whole"))
        assert without_seconds(found) == without_seconds(expected)


def test_a_server_that_cannot_be_used_is_named_before_the_run_begins(start, monkeypatch, tmp_path):
    flags = [*TINY, "--output_dir", tmp_path, "--rollout_engine", "vllm", "--run_name", "r"]
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(weights_folder, "SHARED_MEMORY", memory)
    server = start()
    server.logprobs_mode = "raw_logprobs"
    done = run_here(*flags, "--vllm_url", server.url)
    assert done.returncode == 1 and "raw_logprobs" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()
    assert not list(memory.glob(f"{weights_folder.PREFIX}*"))


# ---- the mismatch


def sample_of(log_probs, old_log_probs):
    rollout = Rollout([1], [1] * len(log_probs), log_probs, "", True)
    return Sample(None, rollout, 1.0, 1.0, True, old_log_probs=torch.tensor(old_log_probs))


def test_mismatch_equals_plain_sums():
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (1, 5, 40, 3):
        old = -torch.rand(length, generator=generator)
        noisy = old + 0.2 * torch.randn(length, generator=generator)
        samples.append(sample_of(noisy.tolist(), old.tolist()))
    found = mismatch(samples, 0.05)
    gaps = [
        [float(a) - b for a, b in zip(s.old_log_probs, s.rollout.log_probs, strict=True)] for s in samples
    ]
    tokens = [x for row in gaps for x in row]
    weights = [math.exp(sum(row)) for row in gaps]
    assert found == pytest.approx(
        {
            "sampler_gap_max": max(map(abs, tokens)),
            "sampler_kl": sum(math.exp(x) - 1 - x for x in tokens) / len(tokens),
            "sampler_ess": sum(weights) ** 2 / sum(w * w for w in weights) / 4,
            "masked_fraction": sum(abs(sum(row)) / len(row) > 0.05 for row in gaps) / 4,
        },
        rel=1e-4,
    )
    assert [s.masked for s in samples] == [abs(sum(row)) / len(row) > 0.05 for row in gaps]
    assert 0 < found["masked_fraction"] < 1


@pytest.mark.parametrize("kl_coef", (0.0, 0.3))
def test_masked_responses_have_no_gradient_and_stay_in_the_denominator(start, kl_coef):
    """The gradient of an update against a float64 sum over the other responses."""
    t = with_servers(start(), batch_size=2, mini_batch_size=2, kl_coef=kl_coef, max_grad_norm=1e9)
    t.train_step(problems(2, seed=5))  # away from the starting model
    batch = t.collect(problems(2), 1)
    for sample in batch.samples[::3]:
        sample.masked = True
    exact = reference_gradient(t, batch, kl_coef)
    metrics = t.update(batch)
    assert metrics["grad_norm"] == pytest.approx(exact.norm().item(), rel=1e-3)
    for sample in batch.samples:
        sample.masked = False
    assert reference_gradient(t, batch, kl_coef).norm() != pytest.approx(exact.norm().item(), rel=1e-2)


def reference_gradient(t, batch, kl_coef):
    model = deepcopy(t.model).double()
    start_model = load_model("tiny", device="cpu")[0].double()
    for sample in batch.samples:
        if sample.masked or not sample.has_signal:
            continue
        ids = sample.rollout.prompt_ids, sample.rollout.response_ids
        log_probs = reference.token_log_probs(model, *ids)
        objective = sample.advantage * torch.exp((log_probs - log_probs.detach()).mean())
        if kl_coef:
            with torch.no_grad():
                log_ratio = reference.token_log_probs(start_model, *ids)
            log_ratio = log_ratio - log_probs
            objective = objective - kl_coef * (log_ratio.exp() - 1 - log_ratio).mean()
        (-objective / len(batch.samples)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def shift_one_response(answer, by=0.02):
    choice = answer["choices"][0]
    for token in choice["logprobs"]["content"]:
        token["logprob"] -= by


def test_a_response_far_from_pi_old_is_masked(start, monkeypatch):
    server = start()
    monkeypatch.setitem(rollout_engine.compare.__globals__["TOLERANCE"], "float32", 0.1)  # as in bfloat16
    t = with_servers(server, batch_size=2, mini_batch_size=2)
    t.engine.sync("0")
    server.edit_answer = shift_one_response
    batch = t.collect(problems(2), 0)
    assert [sample.masked for sample in batch.samples] == [True, False, False, False] * 2
    assert batch.metrics["masked_fraction"] == 0.25
    assert batch.metrics["sampler_gap_max"] == pytest.approx(0.02, abs=1e-3)
    metrics = t.update(batch)
    tokens = [sample.num_tokens for sample in batch.samples]
    assert metrics["eligible_fraction"] == 0  # one update
    assert metrics["grad_norm"] > 0 and sum(tokens) > 0
    assert batch.samples[0].record()["masked"] and "masked" not in batch.samples[1].record()


def test_too_many_masked_responses_stop_the_run_until_the_bound_is_raised(
    start, tmp_path, monkeypatch, capsys
):
    server = start()
    monkeypatch.setitem(rollout_engine.compare.__globals__["TOLERANCE"], "float32", 0.1)

    def shift_most(answer):
        for choice in answer["choices"]:
            shift_one_response({"choices": [choice]}, by=0.015)

    server.edit_answer = shift_most
    settings = {"batch_size": 1, "output_dir": str(tmp_path), "run_name": "r", "temperature": 1.5}
    t = with_servers(server, **settings)
    before = weights_of(t.model)
    with pytest.raises(EmergencyStop, match="50% or more of the responses were masked") as stop:
        t.train(problems(6), problems(2, seed=1))
    assert "--mismatch_mask" in stop.value.advice and "--resume" in stop.value.advice
    assert "100% of the responses get no gradient" in capsys.readouterr().err
    metrics = lines_of(tmp_path / "r" / "metrics.jsonl")
    assert len(metrics) == 4 and {line["grad_norm"] for line in metrics} == {0}
    assert torch.equal(weights_of(t.model), before)
    t = with_servers(server, **settings, mismatch_mask=0.02, resume=str(tmp_path / "r"))
    assert t.train(problems(6), problems(2, seed=1))["finished"]
    assert lines_of(tmp_path / "r" / "metrics.jsonl")[-1]["masked_fraction"] == 0


def test_mismatch_alarms():
    def batch(share):
        return {"masked_fraction": share}

    assert mismatch_reason([batch(0.5)] * 4) is None
    assert mismatch_reason([batch(0.5)] * 5) is not None
    assert mismatch_reason([batch(0.5), batch(0.4), *[batch(0.6)] * 4]) is None
    assert mismatch_reason([{}] * 5) is None


# ---- a server of the run's own


@pytest.fixture
def own_server(tmp_path, monkeypatch):
    """Settings under which a run starts a fake server as if it were vLLM's."""
    python = tmp_path / "python"
    fake = ROOT / "tests" / "support" / "fake_vllm.py"
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT}:{ROOT / "tests"} exec {sys.executable} {fake} "$@" --for {tmp_path}\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv(vllm_process.PYTHON_VARIABLE, str(python))
    return ["--dtype", "float32", "--output_dir", tmp_path, "--rollout_engine", "vllm", "--batch_size", 2]


def processes_of(text):
    """The ids of the processes whose command lines contain a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_bytes().decode(errors="replace").replace("\0", " "):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def ends_soon(text, seconds=15):
    deadline = time.monotonic() + seconds
    while processes_of(text) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes_of(text)


def test_a_fork_of_the_trainer_does_not_keep_its_server_alive(tmp_path):
    """It holds the pipe to the guard open."""
    code = (
        "import os, subprocess, sys, time\n"
        f"guard = [sys.executable, {vllm_guard.__file__!r}, {str(tmp_path)!r}]\n"
        f"subprocess.Popen([*guard, 'sleep', '600.{os.getpid()}'], stdin=subprocess.PIPE)\n"
        "time.sleep(1)\n"
        "if os.fork() == 0: time.sleep(20)\n"
        "else: os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert ends_soon(f"sleep 600.{os.getpid()}", seconds=5) and not tmp_path.exists()


def test_weights_of_a_run_that_is_gone_are_removed(start, monkeypatch, tmp_path):
    monkeypatch.setattr(weights_folder, "SHARED_MEMORY", tmp_path)
    gone = tmp_path / f"{weights_folder.PREFIX}1"
    gone.mkdir()
    (gone / weights_folder.LOCK).touch()
    server = start()
    first = with_servers(server)
    assert not gone.exists()
    second = with_servers(start())
    assert first.engine._folder.path.exists() and first.engine._folder.path.parent == tmp_path
    shutil.rmtree(first.engine._folder.path)  # as some systems do when a user logs out
    first.train_step(problems(2))
    first.engine.close()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [second.engine._folder.path]


def test_a_run_may_go_on_without_its_servers(start, tmp_path):
    server = start()
    flags = [*TINY, "--output_dir", tmp_path, "--run_name", "r", "--rollout_engine", "vllm"]
    assert run_here(*flags, "--vllm_url", server.url).returncode == 0
    done = run_here("--resume", tmp_path / "r", "--num_epochs", 2, "--rollout_engine", "transformers")
    assert done.returncode == 0, done.stderr
    lines = lines_of(tmp_path / "r" / "metrics.jsonl")
    assert "masked_fraction" in lines[0] or lines[0]["zero_variance_groups"] == 1
    assert not any("masked_fraction" in line for line in lines[2:])


@contextmanager
def going(tmp_path, *flags):
    """A run in a process of its own, once it has trained on a rollout batch; and its output so far."""
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command(*flags), env=environment(), stdout=file, stderr=file)
    try:
        metrics = tmp_path / flags[flags.index("--run_name") + 1] / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (metrics.exists() and metrics.read_bytes()):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield process, log
    finally:
        process.kill()
        for left in processes_of(f"--for {tmp_path}"):
            os.kill(left, signal.SIGKILL)


@pytest.mark.parametrize("number", (signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)))
def test_no_server_is_left_whatever_ends_the_run(own_server, tmp_path, number):
    with going(tmp_path, *TINY, *own_server, "--run_name", "r", "--num_epochs", 500) as (process, _):
        assert processes_of(f"--for {tmp_path}") and processes_of(f"{tmp_path}/python")
        process.send_signal(number)
        assert process.wait(60) == (130 if number == signal.SIGTERM else -number)
        assert ends_soon(f"--for {tmp_path}") and ends_soon(f"{tmp_path}/python")


@pytest.mark.slow
def test_a_server_killed_in_a_request_ends_the_run_and_resume_loses_nothing(own_server, tmp_path):
    whole = run(*TINY, *own_server, "--run_name", "whole")
    assert whole.returncode == 0, whole.stderr
    assert all(line["sampler_gap"] < EXACT for line in lines_of(tmp_path / "whole" / "metrics.jsonl"))
    assert ends_soon(f"--for {tmp_path}") and ends_soon(f"{tmp_path}/python")
    folder = tmp_path / "killed"
    with going(tmp_path, *TINY, *own_server, "--run_name", "killed") as (process, log):
        (server,) = processes_of(f"--for {tmp_path}")
        os.kill(server, signal.SIGKILL)
        assert process.wait(60) == 1
        printed = log.read_text()
        assert "it was killed (signal 9)" in printed and f"--resume {folder}" in printed
        assert "Traceback" not in printed
        assert ends_soon(f"{tmp_path}/python")
    done = run("--resume", folder)
    assert done.returncode == 0, done.stderr
    for stream in ("metrics", "eval", "samples"):
        found, expected = (lines_of(tmp_path / name / f"{stream}.jsonl") for name in ("killed", "whole"))
        assert without_seconds(found) == without_seconds(expected)


def test_a_server_that_does_not_start_is_named_with_its_first_error(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho '1 WARNING OSError: y'\necho '(W) ValueError: no such head_dim'\n"
        "echo 'RuntimeError: x'\nexit 3\n"
    )
    python.chmod(0o755)
    monkeypatch.setenv(vllm_process.PYTHON_VARIABLE, str(python))
    with pytest.raises(EngineError, match="ended with code 3: ValueError: no such head_dim") as caught:
        trainer(rollout_engine="vllm")
    log = Path(str(caught.value).partition("its log: ")[2].rpartition(")")[0])
    assert "RuntimeError: x" in log.read_text()
    log.unlink()


def test_without_vllm_the_way_to_get_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(vllm_process.PYTHON_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="run python setup.py --with_vllm first, or give the --vllm_url"):
        trainer(rollout_engine="vllm")


def test_the_command_of_a_server_on_a_gpu():
    settings = ServerSettings(Path("m"), "bfloat16", 4096, memory_share=0.4, gpu=1, lora_rank=12)
    flags = " ".join(server_command(Path("python"), settings))
    for expected in ("--gpu-memory-utilization 0.400", "--enable-sleep-mode", "--dtype bfloat16",
                     "--max-lora-rank 16", "--logprobs-mode processed_logprobs",
                     "--generation-config vllm", "--max-model-len 4096"):  # fmt: skip
        assert expected in flags
    assert "chunked" not in flags and "enforce-eager" not in flags
    variables = server_variables({"CUDA_VISIBLE_DEVICES": "4,6", "RANK": "1", "HOME": "/h"}, settings)
    assert variables["CUDA_VISIBLE_DEVICES"] == "6" and variables["HOME"] == "/h"
    assert "RANK" not in variables
    assert server_variables({}, settings)["CUDA_VISIBLE_DEVICES"] == "1"


def test_the_memory_of_a_server_beside_the_trainer():
    # 7B in bfloat16 with 8-bit moments: 15 GB of weights are there, 16 GB of moments are to come.
    needed = vllm_process.server_bytes(7_600_000_000, "bfloat16")
    assert rollout_engine.server_share(64e9, 80e9, 16e9, needed) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="leaves 5.0 GB .* takes 17.2 GB at least: start one on another GPU"):
        rollout_engine.server_share(7.4e9, 24e9, 0.0, needed)


@pytest.mark.slow
def test_a_plan_counts_the_server_on_the_same_gpu():
    def peak(**settings):
        config = with_method(GSPOConfig(dtype="bfloat16", max_new_tokens=64, **settings), "lora")
        plan = plan_training(known_config(EMBEDDED_NAME), config, ALGORITHMS["gspo"].loss, machine)
        return plan and sum(plan.memory.sampling.values())

    machine = machine_for("24", "cuda")
    beside = peak(rollout_engine="vllm")
    elsewhere = peak(rollout_engine="vllm", vllm_url="http://127.0.0.1:1")
    assert beside - elsewhere == vllm_process.server_bytes(134_515_008, "bfloat16")
    machine = machine_for("2", "cuda")
    assert elsewhere < machine.usable_bytes < beside and peak(rollout_engine="vllm") is None


def test_settings_that_do_not_belong_together():
    with pytest.raises(ValueError, match="goes with --rollout_engine vllm"):
        GSPOConfig(vllm_url="http://127.0.0.1:1")
    with pytest.raises(ValueError, match="give URLs such as"):
        GSPOConfig(rollout_engine="vllm", vllm_url="localhost:8000")
