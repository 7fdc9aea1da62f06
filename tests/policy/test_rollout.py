"""Sampling: the distribution, the end of a response, reproducibility, and the model's mode afterwards."""

import pytest
import torch

from gspo.policy import prompt_cache
from gspo.policy.cpu import packed_weights
from gspo.policy.gradient_checkpointing import enable_gradient_checkpointing
from gspo.policy.log_probs import token_log_probs
from gspo.policy.model_loader import load_model
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
    for rollout, expected in zip(rollouts, log_probs, strict=True):
        torch.testing.assert_close(torch.tensor(rollout.log_probs), expected, rtol=1e-4, atol=1e-4)


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


def test_a_cache_keeps_its_content_when_it_grows(llama, monkeypatch):
    sampling = Sampling(max_new_tokens=12, seed=3)
    grown_never = engine(llama).generate(PROMPTS, 2, sampling)
    monkeypatch.setattr(prompt_cache, "SPARE_TOKENS", 1)
    grown_often = engine(llama).generate(PROMPTS, 2, sampling)
    assert [r.response_ids for r in grown_often] == [r.response_ids for r in grown_never]


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
