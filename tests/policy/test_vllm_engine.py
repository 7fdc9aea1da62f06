"""The engine that samples from vLLM servers: with a fake server that has every fault, and with a real one.

Those with a real one need the environment that `python setup.py --with_vllm` makes:

    python -m pytest -m vllm -n 0
"""

import socket
from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM

from gspo.policy import vllm_process
from gspo.policy.log_probs import token_log_probs
from gspo.policy.lora import adapter_weights, add_adapters, save_adapters
from gspo.policy.model_loader import load_model
from gspo.policy.rollout import Sampling
from gspo.policy.saved_model import save_model, save_tokenizer
from gspo.policy.tiny_models import tiny_config, tiny_tokenizer
from gspo.policy.vllm_engine import EngineError, VLLMEngine, _seed_of, compare
from gspo.policy.vllm_process import ServerSettings, VLLMProcess, server_command, vllm_python
from gspo.policy.vllm_server import VLLMServer

RESET = "/reset_prefix_cache?reset_running_requests=true"
TEXTS = ["sort 31", "sort 5204", "what"]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", device="cpu")


@pytest.fixture
def prompts(tiny):
    return [tiny[1](text)["input_ids"] for text in TEXTS]


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


def test_rollouts_have_what_those_of_the_engine_in_the_process_have(tiny, start_vllm, prompts):
    sampling = Sampling(max_new_tokens=12, temperature=0.8, max_length=16, seed=3 << 70)
    rollouts = engine_of(tiny, start_vllm()).generate(prompts, 5, sampling)
    assert [r.prompt_ids for r in rollouts] == [prompt for prompt in prompts for _ in range(5)]
    assert gap(rollouts, tiny[0], 0.8) < 1e-4
    end = tiny[1].eos_token_id
    assert {r.finished for r in rollouts} == {True, False}
    for r in rollouts:
        assert (end in r.response_ids) == r.finished == (r.response_ids[-1] == end)
        assert r.finished or len(r.response_ids) == min(12, 16 - len(r.prompt_ids))
        assert r.text == tiny[1].decode(r.response_ids, skip_special_tokens=True)


def test_greedy_responses_have_log_probability_0(tiny, start_vllm, prompts):
    first, second = engine_of(tiny, start_vllm()).generate(prompts[:1], 2, Sampling(6, temperature=0))
    assert first == second and set(first.log_probs) == {0.0}


def test_a_response_depends_on_the_seed_and_its_place_alone(tiny, start_vllm, prompts):
    one, two = engine_of(tiny, start_vllm()), engine_of(tiny, start_vllm(), start_vllm())
    rollouts = one.generate(prompts, 3, Sampling(8, seed=5))
    assert two.generate(prompts, 3, Sampling(8, seed=5)) == rollouts
    assert one.generate(prompts[1:], 3, Sampling(8, seed=6)) == rollouts[3:]
    assert one.generate(prompts, 3, Sampling(8, seed=4)) != rollouts
    assert len({tuple(r.response_ids) for r in rollouts}) > 5
    seeds = [_seed_of(stream) + g for stream in (0, 1, 1 << 32, 1 << 64, 1 << 100) for g in range(8)]
    assert len(set(seeds)) == 40 and max(seeds) < 1 << 63


def test_log_probs_are_those_at_temperature_1(tiny, start_vllm, prompts):
    responses = [tiny[1](text)["input_ids"] for text in ("13", "0245", "?!")]
    found = engine_of(tiny, start_vllm(), start_vllm()).log_probs(prompts, responses)
    expected = log_probs_of(tiny[0])(prompts, responses, 1.0)
    assert [pytest.approx(row, abs=1e-5) for row in expected] == found


def test_servers_take_new_weights(tiny, start_vllm, prompts, tmp_path):
    servers = start_vllm(), start_vllm()
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


def test_a_slow_start_is_waited_for(tiny, start_vllm, prompts):
    server = start_vllm()
    server.refuses_health = 3
    assert engine_of(tiny, server).generate(prompts, 1, Sampling(2))


def test_a_dead_server_is_named(tiny, start_vllm, prompts):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineError, match=f"{url}: not there for 0 s .*refused"):
        VLLMEngine([url], *tiny, start_timeout_s=0.1)
    server = start_vllm()
    engine = engine_of(tiny, server, start_timeout_s=0.1)
    server.stop()
    with pytest.raises(EngineError, match="not there"):
        engine.generate(prompts, 1, Sampling(2))


def test_a_hung_server_is_named(tiny, start_vllm, prompts):
    server = start_vllm()
    engine = engine_of(tiny, server, answer_timeout_s=0.3)
    server.may_answer.clear()
    with pytest.raises(EngineError, match="hung: no answer for"):
        engine.generate(prompts, 1, Sampling(2))


@pytest.mark.parametrize("dies_at", (1, 2, 3))
def test_a_server_killed_mid_request_loses_and_repeats_nothing(tiny, start_vllm, prompts, tmp_path, dies_at):
    policy = changed(tiny[0])
    save_model(policy, tmp_path / "1", torch.float32)
    server, other = start_vllm(), start_vllm()
    engine, undisturbed = engine_of(tiny, server), engine_of(tiny, other)
    for each in (engine, undisturbed):
        each.sync(tmp_path / "1", "1")
    server.dies_at = dies_at
    rollouts = engine.generate(prompts, 3, Sampling(6))
    assert rollouts == undisturbed.generate(prompts, 3, Sampling(6))
    assert gap(rollouts, policy, 1.0) < 1e-4
    assert server.requests[RESET] == 2, "it had to take the weights again, once"


def test_a_server_restarted_between_batches_gets_the_weights_again(tiny, start_vllm, prompts, tmp_path):
    policy = changed(tiny[0])
    save_model(policy, tmp_path / "1", torch.float32)
    server = start_vllm()
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


def test_an_internal_error_is_tried_again_and_then_named(tiny, start_vllm, prompts):
    server = start_vllm()
    engine = engine_of(tiny, server)
    server.fails = 2
    assert engine.generate(prompts[:1], 1, Sampling(2))
    server.fails = 3
    with pytest.raises(EngineError, match="fails every time .HTTP 500, out of memory"):
        engine.generate(prompts[:1], 1, Sampling(2))


# ---- adapters


def with_adapters(tiny, amount=0.3):
    """`tiny` with LoRA adapters that change it, and their configuration."""
    model = deepcopy(tiny[0])
    config = add_adapters(model, 4, 0, "tiny")
    with torch.no_grad():
        for weights in adapter_weights(model).values():
            weights += amount * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    return model, config


def test_a_restarted_server_gets_its_adapters_again(tiny, start_vllm, prompts, tmp_path):
    policy, config = with_adapters(tiny)
    save_adapters(policy, config, tmp_path / "1")
    server = start_vllm()
    engine = engine_of(tiny, server, adapters=True)
    engine.sync(tmp_path / "1", "run-1")
    expected = engine.generate(prompts, 3, Sampling(6))
    assert gap(expected, policy, 1.0) < 1e-4 < gap(expected, tiny[0], 1.0)
    server.restart()
    assert engine.generate(prompts, 3, Sampling(6)) == expected
    assert list(server.adapted) == ["run-1"]
    engine._at_once([(engine.servers[0]._load, (tmp_path / "1", "run-1"))])  # as after a lost answer
    engine.sync(tmp_path / "1", "run-2")
    assert list(server.adapted) == ["run-2"]
    server.restart()  # what it was to drop is gone
    engine.sync(tmp_path / "1", "run-3")


def test_adapters_that_cannot_be_loaded_are_named(tiny, start_vllm, tmp_path):
    engine = engine_of(tiny, start_vllm(), adapters=True)
    with pytest.raises(EngineError, match="does not load adapters from .*no adapter found.*--enable-lora"):
        engine.sync(tmp_path / "1", "run-1")


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
def test_incomplete_answers_are_refused(tiny, start_vllm, prompts, edit, message):
    server = start_vllm()
    engine = engine_of(tiny, server)
    engine.end_ids = []
    server.edit_answer = edit
    with pytest.raises(EngineError, match=message):
        engine.generate(prompts, 2, Sampling(5))


def test_incomplete_log_probs_are_refused(tiny, start_vllm, prompts):
    server = start_vllm()
    engine = engine_of(tiny, server)
    server.edit_answer = drop_log_prob
    with pytest.raises(EngineError, match="gave 1 log-probabilities for a response of 2 tokens"):
        engine.log_probs(prompts[:1], [[5, 6]])


def test_another_model_is_refused(tiny, start_vllm, llama):
    with pytest.raises(EngineError, match="another model: .*'llama'.* instead of .*'qwen3'"):
        engine_of(tiny, start_vllm(model=llama))


def test_another_tokenizer_is_refused(tiny, start_vllm):
    def shifted(text):
        return {"input_ids": [token + 1 for token in tiny[1](text)["input_ids"]]}

    with pytest.raises(EngineError, match="another tokenizer"):
        engine_of(tiny, start_vllm(tokenizer=shifted))


def test_a_server_that_would_die_of_seeds_is_refused(tiny, start_vllm):
    server = start_vllm()
    server.cuts_prompts = True
    with pytest.raises(EngineError, match="dies of seeds: start it with --no-enable-chunked-prefill"):
        engine_of(tiny, server)


def test_log_probs_without_temperature_are_refused(tiny, start_vllm, prompts):
    server = start_vllm()
    server.without_temperature = True
    with pytest.raises(EngineError, match="those without temperature: .*--logprobs-mode processed_logprobs"):
        engine_of(tiny, server).check(log_probs_of(tiny[0]))
    server.logprobs_mode = "raw_logprobs"
    with pytest.raises(EngineError, match="are raw_logprobs, those without temperature"):
        engine_of(tiny, server)


def test_top_p_is_refused(tiny, start_vllm, prompts):
    server = start_vllm()
    engine = engine_of(tiny, server)
    server.top_p = 0.9
    with pytest.raises(EngineError, match="samples with top-p, top-k or min-p"):
        engine.check(log_probs_of(tiny[0]))


def test_weights_that_were_not_loaded_are_noticed(tiny, start_vllm, prompts, tmp_path):
    server = start_vllm()
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


def test_what_is_no_vllm_is_named(tiny, start_vllm):
    server = start_vllm()
    server.answer = lambda path, body: (404, "a page")
    with pytest.raises(EngineError, match="does not answer as vLLM .* does.*HTTP Error 404"):
        engine_of(tiny, server)


@pytest.mark.parametrize(
    ("status", "body", "advice"),
    (
        (404, {"detail": "Not Found"}, "VLLM_SERVER_DEV_MODE=1"),
        (
            500,
            {"error": {"message": "'CPUWorker' object has no attribute 'describe_policy'"}},
            "--worker-extension-cls gspo.policy.vllm_extension.PolicyWorker",
        ),
    ),
)
def test_forgotten_flags_are_named(tiny, start_vllm, status, body, advice):
    server = start_vllm()
    answer = server.answer
    server.answer = lambda path, given: (status, body) if path == "/collective_rpc" else answer(path, given)
    with pytest.raises(EngineError, match=f"start it with .*{advice}"):
        engine_of(tiny, server)


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


@pytest.fixture
def real_server(served, tmp_path, monkeypatch):
    """Returns a function that starts a real server in float32, as a run starts it."""
    try:
        vllm_python()
    except ValueError as error:
        pytest.skip(str(error))
    save_model(served[0], tmp_path / "served")
    save_tokenizer(served[1], tmp_path / "served")
    processes = []

    def start(lora_rank=0, edit=lambda command: command):
        monkeypatch.setattr(vllm_process, "server_command", lambda *given: edit(server_command(*given)))
        settings = ServerSettings(tmp_path / "served", "float32", max_length=256, lora_rank=lora_rank)
        processes.append(VLLMProcess(settings, tmp_path / "served"))
        return processes[-1]

    yield start
    for process in processes:
        process.stop()


@pytest.mark.vllm
def test_a_real_server(served, real_server, prompts, tmp_path, monkeypatch):
    process = real_server()
    engine = VLLMEngine([process.url], *served, process=process)
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
    monkeypatch.setattr(VLLMServer, "generate", with_top_p(VLLMServer.generate))
    with pytest.raises(EngineError, match="it samples with top-p, top-k or min-p"):
        engine.check(log_probs_of(policy))


def with_top_p(generate):
    def generate_with_top_p(server, body):
        return generate(server, body | {"sampling_params": body["sampling_params"] | {"top_p": 0.7}})

    return generate_with_top_p


def largest_mass_above(rollout, model):
    """The largest probability that all more probable tokens have together, over the sampled tokens."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    with torch.no_grad():
        probs = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1].softmax(-1)  # (|y|, V)
    own = probs.gather(1, torch.tensor(rollout.response_ids)[:, None])
    return torch.where(probs > own, probs, 0.0).sum(1).max().item()


@pytest.mark.vllm
def test_a_real_server_with_its_own_defaults(served, real_server, prompts, tmp_path, monkeypatch):
    """Log-probabilities without temperature, and a top-p in the model's own generation config."""
    served[0].generation_config.update(do_sample=True, top_p=0.5)

    def with_defaults(command):
        for flag in ("--logprobs-mode", "--generation-config"):
            place = command.index(flag)
            command = command[:place] + command[place + 2 :]
        return command

    process = real_server(edit=with_defaults)
    with pytest.raises(EngineError, match="raw_logprobs, those without temperature: start it with"):
        VLLMEngine([process.url], *served, process=process)
    # The same server again, but now it may not say which kind its log-probabilities are.
    monkeypatch.setattr(VLLMServer, "_refuse_other_settings", lambda server: None)
    monkeypatch.setattr(VLLMEngine, "tolerance", 1e-3)
    engine = VLLMEngine([process.url], *served, process=process)
    with pytest.raises(EngineError, match="its log-probabilities are those without temperature"):
        engine.check(log_probs_of(served[0]))
    rollouts = engine.generate(prompts, 8, Sampling(12))
    assert gap(rollouts, served[0], 1.0) < 1e-4
    assert max(largest_mass_above(r, served[0]) for r in rollouts) > 0.6, "top-p must not apply"


@pytest.mark.vllm
def test_a_real_server_with_adapters(served, real_server, prompts, tmp_path):
    policy = deepcopy(served[0])
    adapters = add_adapters(policy, 4, 0, "served")
    process = real_server(lora_rank=4)
    engine = VLLMEngine([process.url], *served, adapters=True, process=process)
    for version in ("1", "2"):
        with torch.no_grad():
            for weights in adapter_weights(policy).values():
                weights += 0.3 * torch.randn(weights.shape)
        save_adapters(policy, adapters, tmp_path / version)
        engine.sync(tmp_path / version, version)
        assert engine.check(log_probs_of(policy)) < 1e-4
        assert gap(engine.generate(prompts, 4, Sampling(12)), policy, 1.0) < 1e-4
    names = [model["id"] for model in engine.servers[0]._ask("/v1/models")["data"]]
    assert names == ["policy", "2"]


def test_rounding_alone_is_no_fault():
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 0.05
    expected = [-1.0] * 500
    noisy = (noise - 1).tolist()
    assert compare(noisy, expected, 0.1, lambda: [[-2.0] * 500])[1] is None
    raised = (noise - 0.95).tolist()  # all tokens are more probable by 5 %
    assert "top-p" in compare(raised, expected, 0.1, lambda: [[-2.0] * 500])[1]
    assert "stale" in compare((noise * 5 - 1).tolist(), expected, 0.1, lambda: [[-2.0] * 500])[1]
