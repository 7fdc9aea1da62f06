"""Sampling: the distribution, the end of a response, reproducibility, and the model's mode afterwards."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gspo.policy import rollout
from gspo.policy.cpu import packed_weights
from gspo.policy.gradient_checkpointing import enable_gradient_checkpointing
from gspo.policy.log_probs import token_log_probs
from gspo.policy.model_loader import load_model
from gspo.policy.prompt_cache import PreallocatedLayer, decode, prefill
from gspo.policy.rollout import Sampling, TransformersEngine, draw_tokens, draw_uniforms, encode_prompt
from support.models import VOCABULARY, make_model

PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16], [17, 18]]


class IdTokenizer:
    """A tokenizer that decodes ids as numbers and has no chat template."""

    eos_token_id = 2
    chat_template = None

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i == 2))

    def __call__(self, text):
        return {"input_ids": [3 + ord(c) % 50 for c in text]}


def engine(model):
    return TransformersEngine(model, IdTokenizer())


def test_log_probs_are_those_of_token_log_probs(any_model):
    rollouts = engine(any_model).generate(PROMPTS, 3, Sampling(max_new_tokens=14, temperature=0.8, seed=1))
    assert [r.prompt_ids for r in rollouts] == [p for p in PROMPTS for _ in range(3)]
    with torch.no_grad():
        log_probs = token_log_probs(
            any_model, [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], temperature=0.8
        )
    assert len({len(r.response_ids) for r in rollouts}) > 1, "rows must leave the batch at different times"
    for r, expected in zip(rollouts, log_probs, strict=True):
        torch.testing.assert_close(torch.tensor(r.log_probs), expected, rtol=1e-4, atol=1e-4)


def test_responses_end_at_the_first_end_token(any_model):
    rollouts = engine(any_model).generate(PROMPTS, 8, Sampling(max_new_tokens=30, seed=2))
    ended = [r for r in rollouts if r.finished]
    cut = [r for r in rollouts if not r.finished]
    assert ended and all(r.response_ids.index(2) == len(r.response_ids) - 1 for r in ended)
    assert all(2 not in r.response_ids and len(r.response_ids) == 30 for r in cut)
    assert all(len(r.log_probs) == len(r.response_ids) for r in rollouts)


def test_every_end_token_of_the_generation_config_ends_a_response():
    model = make_model("llama")
    model.generation_config.eos_token_id = [2, 7, 8, 9, 10]
    rollouts = engine(model).generate(PROMPTS, 8, Sampling(max_new_tokens=30, seed=0))
    assert {r.response_ids[-1] for r in rollouts if r.finished} > {2}
    assert all(set(r.response_ids[:-1]).isdisjoint({2, 7, 8, 9, 10}) for r in rollouts)


def test_max_length_bounds_prompt_and_response_together(llama):
    rollouts = engine(llama).generate(PROMPTS, 4, Sampling(max_new_tokens=6, max_length=9, seed=3))
    assert all(len(r.response_ids) <= min(6, 9 - len(r.prompt_ids)) for r in rollouts)
    assert all(r.finished or len(r.response_ids) == min(6, 9 - len(r.prompt_ids)) for r in rollouts), (
        "a response was cut off although there was room"
    )


def test_a_sample_depends_on_its_seed_and_prompt_only(llama):
    sampling = Sampling(max_new_tokens=12, seed=5)
    together = engine(llama).generate(PROMPTS, 4, sampling)
    again = engine(llama).generate(PROMPTS, 4, Sampling(max_new_tokens=12, temperature=1.0, seed=5))
    assert together == again, "temperature 1 is the default"
    alone = engine(llama).generate(PROMPTS[1:2], 4, Sampling(max_new_tokens=12, seed=6))
    assert [r.response_ids for r in alone] == [r.response_ids for r in together[4:8]]
    assert len({tuple(r.response_ids) for r in together}) > 12, "responses of a group must differ"


def test_streams_of_seeds_and_responses_are_distinct():
    streams = [
        draw_uniforms(seed, 1, 3, 1).flatten().tolist() for seed in (0, 5, 1 << 32, (1 << 32) + 5, 5 << 64)
    ]
    drawn = [x for stream in streams for x in stream]
    assert len(set(drawn)) == len(drawn) == 15


def test_draws_follow_the_softmax():
    # 40,000 draws over 61 tokens at temperature 0.7; chi-square with 60 degrees exceeds 112 once in 20,000
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    token, log_prob = draw_tokens(logits.expand(len(uniform), -1), 0.7, uniform)
    expected = torch.softmax(logits.double() / 0.7, -1)
    observed = torch.bincount(token, minlength=VOCABULARY)
    chi_square = ((observed - expected * len(uniform)) ** 2 / (expected * len(uniform))).sum().item()
    assert chi_square < 112
    torch.testing.assert_close(log_prob, expected.log()[token].float())


def test_draws_invert_the_cumulative_distribution_of_a_large_vocabulary():
    # blocks of tokens that are whole, cut short by the vocabulary's end, or without any probability
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, 256:768] = -200
    uniform = torch.rand(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    token, log_prob = draw_tokens(logits.expand(len(uniform), -1), 1.0, uniform)
    expected = torch.softmax(logits[0].double(), -1)
    slow = torch.searchsorted(expected.cumsum(-1), uniform, right=True)
    assert (token != slow).sum() <= 1, "one uniform number may be within rounding of a boundary"
    torch.testing.assert_close(log_prob, expected.log()[token].float())


def test_first_tokens_of_a_model_follow_its_softmax(llama):
    sampled = engine(llama).generate([PROMPTS[0]], 6000, Sampling(max_new_tokens=1, temperature=1.3, seed=7))
    observed = torch.bincount(torch.tensor([r.response_ids[0] for r in sampled]), minlength=VOCABULARY)
    with torch.no_grad():
        logits = llama(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = torch.softmax(logits.double() / 1.3, -1) * len(sampled)
    assert ((observed - expected) ** 2 / expected).sum().item() < 112  # 60 degrees, as above


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-float("inf"), 0.0, -float("inf")]] * 2)
    token, log_prob = draw_tokens(logits, 1.0, torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64))
    assert token.tolist() == [1, 1] and log_prob.tolist() == [0, 0]


def test_packed_weights_multiply_as_bfloat16_does(any_model):
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        usual = any_model(input_ids=ids).logits.float()
        with packed_weights(any_model, 8):
            packed = any_model(input_ids=ids).logits.float()
    assert (packed - usual).norm() < 0.02 * usual.norm()
    assert not any("forward" in vars(module) for module in any_model.modules())
    with packed_weights(any_model, 8):  # in float32, packing has no benefit
        assert not any("forward" in vars(module) for module in any_model.modules())


def test_the_cache_is_allocated_once(llama, monkeypatch):
    shapes = []
    new_buffer = PreallocatedLayer._new_buffer

    def recorded(layer, states):
        buffer = new_buffer(layer, states)
        shapes.append(tuple(buffer.shape))
        return buffer.fill_(float("nan"))  # so that what was never written shows

    monkeypatch.setattr(PreallocatedLayer, "_new_buffer", recorded)
    rollouts = engine(llama).generate(PROMPTS, 3, Sampling(max_new_tokens=14, temperature=0.8, seed=1))
    assert shapes == [(12, 2, 7 + 14, 8)] * 4, "keys and values of two layers: (B, heads, P + T, head width)"
    assert len({len(r.response_ids) for r in rollouts}) > 3, "rows must leave the batch at different times"


def test_samples_do_not_depend_on_how_often_ended_rows_are_looked_for(any_model, monkeypatch):
    sampling = Sampling(max_new_tokens=14, seed=1)
    always = engine(any_model).generate(PROMPTS, 3, sampling)
    monkeypatch.setattr(rollout, "_look_every", lambda device: 5)
    seldom = engine(any_model).generate(PROMPTS, 3, sampling)
    assert [r.response_ids for r in seldom] == [r.response_ids for r in always]
    assert [r.finished for r in seldom] == [r.finished for r in always]
    for one, other in zip(seldom, always, strict=True):
        torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs))


class Waits(TorchDispatchMode):
    """Counts the operations for which a GPU would have to finish its work first."""

    NAMES = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh"}
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        self.count += name in self.NAMES or any(x is not None and x.dtype == torch.bool for x in indices)
        return function(*args, **(kwargs or {}))


def test_between_two_looks_nothing_waits_for_the_device(llama, monkeypatch):
    monkeypatch.setattr(rollout, "_look_every", lambda device: 1000)
    counts = []
    for tokens in (2, 9):
        with Waits() as waits:
            engine(llama).generate(PROMPTS, 2, Sampling(max_new_tokens=tokens))
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_prompt_and_a_token_run_on_fake_tensors(family):
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model = make_model(family)
        logits, cache, mask = prefill(model, PROMPTS, 3, 5)
        token, _ = draw_tokens(logits, 1.0, torch.rand(12, dtype=torch.float64))
        logits = decode(model, cache, mask, token, mask[:, :7].sum(1))
    assert logits.shape == (12, VOCABULARY) and mask.shape == (12, 7 + 5)
    assert cache.get_seq_length() == 8


def test_an_ended_row_asks_for_no_position_that_the_model_does_not_have(monkeypatch):
    # gpt2 has 64 positions; the rows of the long prompt end after 4 tokens and stay in the batch
    monkeypatch.setattr(rollout, "COMPACT_SHARE", 1.0)
    prompts = [[5 + i % 50 for i in range(60)], [9], [17, 18]]
    sampler = engine(make_model("gpt2"))
    sampler.end_ids = []
    rollouts = sampler.generate(prompts, 1, Sampling(max_new_tokens=30, max_length=64))
    assert [len(r.response_ids) for r in rollouts] == [4, 30, 30]


class SmallMemory:
    """A hook of a model: more rows than fit raise an error. It also counts the prompts that are processed."""

    def __init__(self, rows):
        self.rows, self.prompts = rows, 0

    def __call__(self, model, args, kwargs):
        rows, tokens = kwargs["input_ids"].shape
        if rows > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.prompts += rows * (tokens > 1)


@pytest.mark.parametrize("fitting, then", [(7, 4), (4, 4), (3, 2), (1, 1)])
def test_without_memory_for_all_rows_the_same_responses_come_in_smaller_batches(fitting, then, capfd):
    model = make_model("llama")
    sampling = Sampling(max_new_tokens=12, seed=5)
    expected = [r.response_ids for r in engine(model).generate(PROMPTS, 4, sampling)]
    sampler = engine(model)
    hook = SmallMemory(fitting)
    model.register_forward_pre_hook(hook, with_kwargs=True)
    assert [r.response_ids for r in sampler.generate(PROMPTS, 4, sampling)] == expected
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1] == f"out of memory: from now on, at most {then} responses are sampled at a time"
    assert sampler.row_limit == then and len(lines) == {4: 2, 2: 3, 1: 4}[then]
    assert [r.response_ids for r in sampler.generate(PROMPTS, 4, sampling)] == expected
    assert not capfd.readouterr().err, "the second call begins with what fits"


def test_batches_sampled_before_memory_ran_out_are_kept():
    model = make_model("llama")
    expected = engine(model).generate(PROMPTS, 4, Sampling(max_new_tokens=12, seed=5))
    hook = SmallMemory(8)
    model.register_forward_pre_hook(hook, with_kwargs=True)
    sampler = TransformersEngine(model, IdTokenizer(), max_rows=10)  # two groups of four
    sample_batch, sampled = sampler._sample_batch, []

    def recorded(prompts, *args):
        rollouts = sample_batch(prompts, *args)
        sampled.append(len(rollouts))
        hook.rows = 3
        return rollouts

    sampler._sample_batch = recorded
    rollouts = sampler.generate(PROMPTS, 4, Sampling(max_new_tokens=12, seed=5))
    assert [r.response_ids for r in rollouts] == [r.response_ids for r in expected]
    assert sampled == [8, 2, 2, 2, 2]


def test_other_errors_and_a_single_row_that_does_not_fit_are_raised(capfd):
    model = make_model("llama")
    hook = SmallMemory(0)
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        engine(model).generate(PROMPTS, 2, Sampling(max_new_tokens=4))
    assert "at most 1 responses" in capfd.readouterr().err
    handle.remove()

    def broken(*_):
        raise RuntimeError("shapes do not match")

    model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        engine(model).generate(PROMPTS, 2, Sampling(max_new_tokens=4))
    assert not capfd.readouterr().err


def test_temperature_zero_is_greedy(llama):
    rollout = engine(llama).generate([PROMPTS[0]], 1, Sampling(max_new_tokens=8, temperature=0.0))[0]
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
    with torch.no_grad():
        greedy = llama(input_ids=ids).logits[0].argmax(-1)
    assert greedy[len(PROMPTS[0]) - 1 : -1].tolist() == rollout.response_ids


def test_sampling_restores_the_mode_of_every_module():
    model = make_model("gpt2")
    enable_gradient_checkpointing(model)
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2, "some modules in training mode and others not"
    engine(model).generate(PROMPTS, 2, Sampling(max_new_tokens=4))
    assert [module.training for module in model.modules()] == before
    assert model.transformer.h[1].gradient_checkpointing and torch.is_grad_enabled()


@pytest.mark.parametrize("prompt", [[], [5] * 9])
def test_prompts_without_room_are_refused(llama, prompt):
    with pytest.raises(ValueError):
        engine(llama).generate([prompt], 2, Sampling(max_new_tokens=4, max_length=9))


def test_prompts_go_through_the_chat_template_or_a_plain_frame():
    _, tokenizer = load_model("tiny", device="cpu")
    assert tokenizer.decode(encode_prompt(tokenizer, "9381=")) == "9381="
    plain = IdTokenizer()
    assert encode_prompt(plain, "hi") == plain("Question: hi\nAnswer:")["input_ids"]


def test_chat_messages_a_system_prompt_and_settings_of_the_template():
    tokenizer = load_model("tiny")[1]
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[go{{ mood }}]{% endif %}"
    )

    def rendered(*arguments):
        return tokenizer.decode(encode_prompt(tokenizer, *arguments))

    assert rendered("hi") == "[user]hi[go]"
    assert rendered("hi", "Be brief.", {"mood": "!"}) == "[system]Be brief.[user]hi[go!]"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat += [{"role": "user", "content": "c"}]
    assert rendered(chat, "S") == "[system]S[user]a[assistant]b[user]c[go]" and len(chat) == 3
    own = [{"role": "system", "content": "mine"}, *chat[:1]]
    assert rendered(own, "S") == "[system]mine[user]a[go]"
    for refused in ({"messages": 3}, {"tokenize": True}):
        with pytest.raises(ValueError, match="chat template refuses the prompt"):
            rendered("hi", None, refused)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    )
    with pytest.raises(ValueError, match="refuses the prompt .No system!.: leave out --system_prompt"):
        rendered("hi", "S")
    tokenizer.chat_template = None
    assert encode_prompt(tokenizer, "hi", "S") == tokenizer("Question: S\n\nhi\nAnswer:")["input_ids"]
