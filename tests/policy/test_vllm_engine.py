"""The engine that samples from vLLM servers: with a fake server that has every fault, and with a real one.

The test with a real one needs the Python of an environment with vLLM:

    GSPO_VLLM_PYTHON=.../bin/python python -m pytest -m vllm -n 0 tests/policy/test_vllm_engine.py
"""

import os
import signal
import socket
import subprocess
from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM

from gspo.policy import vllm_extension, vllm_server
from gspo.policy.log_probs import token_log_probs
from gspo.policy.model_loader import load_model
from gspo.policy.rollout import Sampling
from gspo.policy.saved_model import save_model, save_tokenizer
from gspo.policy.tiny_models import tiny_config, tiny_tokenizer
from gspo.policy.vllm_engine import EngineError, VLLMEngine, _seed_of, compare
from support import ROOT
from support.fake_vllm import FakeVLLM

RESET = "/reset_prefix_cache?reset_running_requests=true"
TEXTS = ["sort 31", "sort 5204", "what"]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", device="cpu")


@pytest.fixture
def prompts(tiny):
    return [tiny[1](text)["input_ids"] for text in TEXTS]


@pytest.fixture
def start(tiny, monkeypatch):
    """Returns a function that starts a fake server with `tiny`, or with another model and tokenizer."""
    monkeypatch.setattr(vllm_extension, "_rebuild_output_layers", lambda model: None)
    monkeypatch.setattr(vllm_server, "HEALTH_INTERVAL_S", 0.01)
    servers = []

    def start_one(model=None, tokenizer=None):
        servers.append(FakeVLLM(model or tiny[0], tokenizer or tiny[1]))
        return servers[-1]

    yield start_one
    for server in servers:
        server.stop()


def engine_of(tiny, *servers, **timeouts):
    timeouts = {"start_timeout_s": 2.0, "answer_timeout_s": 30.0, **timeouts}
    return VLLMEngine([server.url for server in servers], *tiny, **timeouts)


def changed(model, amount=0.3):
    """A copy of the model with other weights."""
    model = deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            noise = torch.randn(weights.shape, generator=generator)
            weights += amount * weights.std(correction=0) * noise
    return model


def log_probs_of(model):
    """What VLLMEngine.check() asks: the trainer's log-probabilities."""

    def log_probs_at(prompts, responses, temperature):
        with torch.no_grad():
            return [row.tolist() for row in token_log_probs(model, prompts, responses, temperature)]

    return log_probs_at


def gap(rollouts, model, temperature):
    """The largest distance of the rollouts' log-probabilities from those under the model."""
    rows = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    expected = log_probs_of(model)(*rows, temperature)
    return max(
        abs(a - b) for r, row in zip(rollouts, expected, strict=True)
        for a, b in zip(r.log_probs, row, strict=True)
    )  # fmt: skip


def test_rollouts_have_what_those_of_the_engine_in_the_process_have(tiny, start, prompts):
    sampling = Sampling(max_new_tokens=12, temperature=0.8, max_length=16, seed=3 << 70)
    rollouts = engine_of(tiny, start()).generate(prompts, 5, sampling)
    assert [r.prompt_ids for r in rollouts] == [prompt for prompt in prompts for _ in range(5)]
    assert gap(rollouts, tiny[0], 0.8) < 1e-4
    end = tiny[1].eos_token_id
    assert {r.finished for r in rollouts} == {True, False}
    for r in rollouts:
        assert (end in r.response_ids) == r.finished == (r.response_ids[-1] == end)
        assert r.finished or len(r.response_ids) == min(12, 16 - len(r.prompt_ids))
        assert r.text == tiny[1].decode(r.response_ids, skip_special_tokens=True)


def test_greedy_responses_have_log_probability_0(tiny, start, prompts):
    first, second = engine_of(tiny, start()).generate(prompts[:1], 2, Sampling(6, temperature=0))
    assert first == second and set(first.log_probs) == {0.0}


def test_a_response_depends_on_the_seed_and_its_place_alone(tiny, start, prompts):
    one, two = engine_of(tiny, start()), engine_of(tiny, start(), start())
    rollouts = one.generate(prompts, 3, Sampling(8, seed=5))
    assert two.generate(prompts, 3, Sampling(8, seed=5)) == rollouts
    assert one.generate(prompts[1:], 3, Sampling(8, seed=6)) == rollouts[3:]
    assert one.generate(prompts, 3, Sampling(8, seed=4)) != rollouts
    assert len({tuple(r.response_ids) for r in rollouts}) > 5
    seeds = [_seed_of(stream) + g for stream in (0, 1, 1 << 32, 1 << 64, 1 << 100) for g in range(8)]
    assert len(set(seeds)) == 40 and max(seeds) < 1 << 63


def test_log_probs_are_those_at_temperature_1(tiny, start, prompts):
    responses = [tiny[1](text)["input_ids"] for text in ("13", "0245", "?!")]
    found = engine_of(tiny, start(), start()).log_probs(prompts, responses)
    expected = log_probs_of(tiny[0])(prompts, responses, 1.0)
    assert [pytest.approx(row, abs=1e-5) for row in expected] == found


def test_servers_take_new_weights(tiny, start, prompts, tmp_path):
    servers = start(), start()
    engine = engine_of(tiny, *servers)
    policy = changed(tiny[0])
    assert engine.check(log_probs_of(tiny[0])) < 1e-4
    with pytest.raises(EngineError, match="stale or another model's"):
        engine.check(log_probs_of(policy))
    save_model(policy, tmp_path / "1", engine.dtype)
    engine.sync(tmp_path / "1", "1")
    assert engine.check(log_probs_of(policy)) < 1e-4
    assert gap(engine.generate(prompts, 2, Sampling(6)), policy, 1.0) < 1e-4
    assert [server.requests[RESET] for server in servers] == [1, 1]


# ---- servers that die, hang and come back


def test_a_slow_start_is_waited_for(tiny, start, prompts):
    server = start()
    server.refuses_health = 3
    assert engine_of(tiny, server).generate(prompts, 1, Sampling(2))


def test_a_dead_server_is_named(tiny, start, prompts):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineError, match=f"{url}: not there for 0 s .*refused"):
        VLLMEngine([url], *tiny, start_timeout_s=0.1)
    server = start()
    engine = engine_of(tiny, server, start_timeout_s=0.1)
    server.stop()
    with pytest.raises(EngineError, match="not there"):
        engine.generate(prompts, 1, Sampling(2))


def test_a_hung_server_is_named(tiny, start, prompts):
    server = start()
    engine = engine_of(tiny, server, answer_timeout_s=0.3)
    server.may_answer.clear()
    with pytest.raises(EngineError, match="hung: no answer for"):
        engine.generate(prompts, 1, Sampling(2))


@pytest.mark.parametrize("dies_at", (1, 2, 3))
def test_a_server_killed_mid_request_loses_and_repeats_nothing(tiny, start, prompts, tmp_path, dies_at):
    policy = changed(tiny[0])
    save_model(policy, tmp_path / "1", torch.float32)
    server, other = start(), start()
    engine, undisturbed = engine_of(tiny, server), engine_of(tiny, other)
    for each in (engine, undisturbed):
        each.sync(tmp_path / "1", "1")
    server.dies_at = dies_at
    rollouts = engine.generate(prompts, 3, Sampling(6))
    assert rollouts == undisturbed.generate(prompts, 3, Sampling(6))
    assert gap(rollouts, policy, 1.0) < 1e-4
    assert server.requests[RESET] == 2, "it had to take the weights again, once"


def test_a_server_restarted_between_batches_gets_the_weights_again(tiny, start, prompts, tmp_path):
    policy = changed(tiny[0])
    save_model(policy, tmp_path / "1", torch.float32)
    server = start()
    engine = engine_of(tiny, server)
    engine.sync(tmp_path / "1", "1")
    server.restart()
    assert gap(engine.generate(prompts, 2, Sampling(6)), policy, 1.0) < 1e-4
    other = engine_of(tiny, server)
    server.restart()
    other.expect(tmp_path / "1", "1")
    assert gap(other.generate(prompts, 2, Sampling(6)), policy, 1.0) < 1e-4
    server.restart()
    server.loads = False
    server.keeps_version = True
    with pytest.raises(EngineError, match="stale weights: it says version default after 1 was loaded"):
        engine.generate(prompts, 1, Sampling(2))


def test_an_internal_error_is_tried_again_and_then_named(tiny, start, prompts):
    server = start()
    engine = engine_of(tiny, server)
    server.fails = 2
    assert engine.generate(prompts[:1], 1, Sampling(2))
    server.fails = 3
    with pytest.raises(EngineError, match="fails every time .HTTP 500, out of memory"):
        engine.generate(prompts[:1], 1, Sampling(2))


# ---- servers that answer, but wrongly


def drop_response(answer):
    del answer["choices"][1]


def repeat_response(answer):
    answer["choices"][1] = answer["choices"][0]


def drop_log_prob(answer):
    answer["choices"][0]["logprobs"]["content"].pop()
    answer.get("prompt_logprobs", [0]).pop()


def drop_tokens(answer):
    choice = answer["choices"][0]
    choice["token_ids"] = choice["token_ids"][:2]
    choice["logprobs"]["content"] = choice["logprobs"]["content"][:2]


@pytest.mark.parametrize(
    "edit, message",
    (
        (drop_response, "answered with 1 responses instead of 2"),
        (repeat_response, "answered with 2 responses instead of 2"),
        (drop_log_prob, "gave 4 log-probabilities for a response of 5 tokens"),
        (drop_tokens, r"ended after 2 of 5 tokens \(length\)"),
    ),
)
def test_incomplete_answers_are_refused(tiny, start, prompts, edit, message):
    server = start()
    engine = engine_of(tiny, server)
    engine.end_ids = []
    server.edit_answer = edit
    with pytest.raises(EngineError, match=message):
        engine.generate(prompts, 2, Sampling(5))


def test_incomplete_log_probs_are_refused(tiny, start, prompts):
    server = start()
    engine = engine_of(tiny, server)
    server.edit_answer = drop_log_prob
    with pytest.raises(EngineError, match="gave 1 log-probabilities for a response of 2 tokens"):
        engine.log_probs(prompts[:1], [[5, 6]])


def test_another_model_is_refused(tiny, start, llama):
    with pytest.raises(EngineError, match="another model: .*'llama'.* instead of .*'qwen3'"):
        engine_of(tiny, start(model=llama))


def test_another_tokenizer_is_refused(tiny, start):
    def shifted(text):
        return {"input_ids": [token + 1 for token in tiny[1](text)["input_ids"]]}

    with pytest.raises(EngineError, match="another tokenizer"):
        engine_of(tiny, start(tokenizer=shifted))


def test_a_server_that_would_die_of_seeds_is_refused(tiny, start):
    server = start()
    server.cuts_prompts = True
    with pytest.raises(EngineError, match="dies of seeds: start it with --no-enable-chunked-prefill"):
        engine_of(tiny, server)


def test_log_probs_without_temperature_are_refused(tiny, start, prompts):
    server = start()
    server.without_temperature = True
    with pytest.raises(EngineError, match="those without temperature: .*--logprobs-mode processed_logprobs"):
        engine_of(tiny, server).check(log_probs_of(tiny[0]))
    server.logprobs_mode = "raw_logprobs"
    with pytest.raises(EngineError, match="are raw_logprobs, those without temperature"):
        engine_of(tiny, server)


def test_top_p_is_refused(tiny, start, prompts):
    server = start()
    engine = engine_of(tiny, server)
    server.top_p = 0.9
    with pytest.raises(EngineError, match="samples with top-p, top-k or min-p"):
        engine.check(log_probs_of(tiny[0]))


def test_weights_that_were_not_loaded_are_noticed(tiny, start, prompts, tmp_path):
    server = start()
    engine = engine_of(tiny, server)
    policy = changed(tiny[0])
    save_model(policy, tmp_path / "1", torch.float32)
    with pytest.raises(EngineError, match="finds no weights in .*is the folder shared with it"):
        engine.sync(tmp_path / "2", "2")
    server.loads = False
    engine.sync(tmp_path / "1", "1")  # it says that it has
    with pytest.raises(EngineError, match="stale or another model's"):
        engine.check(log_probs_of(policy))
    server.keeps_version = True
    with pytest.raises(EngineError, match="stale weights: it says version 1 after 2"):
        engine.sync(tmp_path / "1", "2")


def test_what_is_no_vllm_is_named(tiny, start):
    server = start()
    server.answer = lambda path, body: (404, "a page")
    with pytest.raises(EngineError, match="HTTP Error 404"):
        engine_of(tiny, server, start_timeout_s=0.1)


@pytest.fixture(scope="module")
def served():
    """A model with large random weights and many end tokens, and its tokenizer."""
    torch.manual_seed(0)
    config = tiny_config("tiny")
    config.head_dim = 32  # vLLM's kernels for CPUs have no heads of 16
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(5)
    model.generation_config.eos_token_id = list(range(1, 12))
    return model, tiny_tokenizer()


@pytest.fixture(scope="module")
def real_server(served, tmp_path_factory):
    """The URL of a real server in float32."""
    python = os.environ.get("GSPO_VLLM_PYTHON")
    if not python:
        pytest.skip("GSPO_VLLM_PYTHON does not name the Python of an environment with vLLM")
    folder = tmp_path_factory.mktemp("served")
    save_model(served[0], folder / "model")
    save_tokenizer(served[1], folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "model", "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager",
        "--distributed-executor-backend", "uni", "--enable-scale-out", "--no-enable-chunked-prefill",
        "--logprobs-mode", "processed_logprobs",
        "--worker-extension-cls", "gspo.policy.vllm_extension.PolicyWorker",
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
    }  # fmt: skip
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    yield f"http://127.0.0.1:{port}"
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.vllm
def test_a_real_server(served, real_server, prompts, tmp_path):
    engine = VLLMEngine([real_server], *served)
    engine.check(log_probs_of(served[0]))
    for temperature in (1.0, 0.7):
        rollouts = engine.generate(prompts, 4, Sampling(12, temperature, seed=3))
        assert gap(rollouts, served[0], temperature) < 1e-4
        assert {r.finished for r in rollouts} == {True, False}
    assert engine.generate(prompts, 4, Sampling(12, temperature, seed=3)) == rollouts
    assert len({tuple(r.response_ids) for r in rollouts[:4]}) > 1

    policy = changed(served[0])
    with pytest.raises(EngineError, match="stale or another model's"):
        engine.check(log_probs_of(policy))
    save_model(policy, tmp_path / "1", engine.dtype)
    engine.sync(tmp_path / "1", "1")
    assert engine.check(log_probs_of(policy)) < 1e-4
    rollouts = engine.generate(prompts, 4, Sampling(12))
    assert gap(rollouts, policy, 1.0) < 1e-4
    rows = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    expected = log_probs_of(policy)(*rows, 1.0)
    assert [pytest.approx(row, abs=1e-4) for row in expected] == engine.log_probs(*rows)
    # As if it had been started again: it takes the weights while it computes other groups.
    engine.servers[0]._ask("/update_weight_version", {"new_version": "default"})
    assert gap(engine.generate(prompts * 4, 4, Sampling(12)), policy, 1.0) < 1e-4
    with pytest.raises(EngineError, match="finds no weights in"):
        engine.sync(tmp_path / "2", "2")
    assert engine.check(log_probs_of(policy)) < 1e-4, "it must go on with the weights that it has"


def test_rounding_alone_is_no_fault():
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 0.05
    expected = [-1.0] * 500
    noisy = (noise - 1).tolist()
    assert compare(noisy, expected, [-2.0] * 500, 0.1)[1] is None
    raised = (noise - 0.95).tolist()  # all tokens are more probable by 5 %
    assert "top-p" in compare(raised, expected, [-2.0] * 500, 0.1)[1]
    assert "stale" in compare((noise * 5 - 1).tolist(), expected, [-2.0] * 500, 0.1)[1]
