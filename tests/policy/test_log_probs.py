"""Log-probabilities and their gradients, compared with float64 ones of single rows for every model family."""

import pytest
import torch

from gspo.checks import float64_reference as reference
from gspo.policy import log_probs as log_probs_module
from gspo.policy import padded_attention
from gspo.policy.group_attention import can_pack
from gspo.policy.log_probs import logit_tokens, micro_batches, token_log_probs
from gspo.policy.planned_device import planned_device
from support.models import VOCABULARY


def ragged_rows(seed=0, rows=7):
    """Return prompts of 1 to 12 tokens and responses of 0 to 15, with one row of each extreme."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    lengths = [(1, 15), (12, 1), (3, 0)]
    lengths += [tuple(torch.randint(1, 13, (2,), generator=generator).tolist()) for _ in range(rows - 3)]
    return [ids(p) for p, _ in lengths], [ids(r) for _, r in lengths]


def groups(seed=0, size=3):
    """Return three prompts of different lengths, repeated for responses of 0 to 13 tokens each."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    prompts = [prompt for prompt in map(ids, (12, 3, 7)) for _ in range(size)]
    lengths = [0, 1, *torch.randint(0, 14, (len(prompts) - 2,), generator=generator).tolist()]
    return prompts, list(map(ids, lengths))


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("scores_at_a_time", [padded_attention.MAX_SCORES, 300])
@pytest.mark.parametrize("rows", [ragged_rows, groups])
def test_values_and_gradients_match_those_of_single_rows(any_model, rows, scores_at_a_time, monkeypatch):
    monkeypatch.setattr(padded_attention, "MAX_SCORES", scores_at_a_time)
    prompts, responses = rows()
    weights = [torch.linspace(-1, 1, len(r)) for r in responses]
    log_probs = token_log_probs(any_model, prompts, responses, temperature=0.7)
    exact = [
        reference.token_log_probs(any_model, p, r, 0.7) if r else torch.zeros(0)
        for p, r in zip(prompts, responses, strict=True)
    ]
    for fast, slow, response in zip(log_probs, exact, responses, strict=True):
        assert fast.dtype == torch.float32 and fast.shape == (len(response),)
        torch.testing.assert_close(fast.double(), slow.double(), rtol=1e-5, atol=1e-5)
    fast = gradient_of(any_model, sum((w * x).sum() for w, x in zip(weights, log_probs, strict=True)))
    slow = gradient_of(any_model, sum((w * x).sum() for w, x in zip(weights, exact, strict=True)))
    assert (fast - slow).norm() / slow.norm() < 1e-5


def test_the_temperature_is_1_by_default(llama):
    for prompt, response in zip(*ragged_rows(6, rows=4), strict=True):
        by_default = token_log_probs(llama, [prompt], [response])[0]
        assert torch.equal(by_default, token_log_probs(llama, [prompt], [response], temperature=1.0)[0])
        if response:
            exact = reference.token_log_probs(llama, prompt, response, 1.0)
            torch.testing.assert_close(by_default.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_other_rows(any_model):
    prompts, responses = ragged_rows(1)
    together = token_log_probs(any_model, prompts, responses)
    for i in range(len(prompts)):
        alone = token_log_probs(any_model, [prompts[i]], [responses[i]])[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-5)


def test_a_packed_row_holds_every_prompt_once_and_no_padding(llama, monkeypatch):
    prompts, responses = groups()
    tokens = []
    embedding = llama.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _layer, inputs, _output: tokens.append(inputs[0].numel()))
    token_log_probs(llama, prompts, responses)
    packed, tokens[:] = list(tokens), []
    monkeypatch.setattr(log_probs_module, "can_pack", lambda model: False)
    token_log_probs(llama, prompts, responses)
    handle.remove()
    own = sum(max(0, len(response) - 1) for response in responses)  # the last token predicts nothing
    widest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    assert packed == [12 + 3 + 7 + own] and tokens == [9 * widest]


def test_models_with_attention_sinks_or_in_training_mode_are_not_packed(any_model, llama):
    assert can_pack(any_model) == (any_model.config.model_type != "gpt_oss")
    llama.train()  # layers may apply dropout
    assert not can_pack(llama)
    llama.eval()


def test_bfloat16_stays_near_float32(llama):
    prompts, responses = groups()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = torch.cat(token_log_probs(llama, prompts, responses))
    exact = torch.cat(token_log_probs(llama, prompts, responses))
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).abs().mean() < 0.02


def test_with_and_without_gradients_the_bits_are_the_same(llama):
    rows = ragged_rows(2)
    with torch.no_grad():
        first = token_log_probs(llama, *rows)
    second = token_log_probs(llama, *rows)  # as in the forward pass of an update
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_number_of_forward_passes_does_not_matter(llama, monkeypatch):
    rows = ragged_rows(3)
    whole = token_log_probs(llama, *rows)
    monkeypatch.setattr(log_probs_module, "MAX_FORWARD_TOKENS", 20)
    for a, b in zip(whole, token_log_probs(llama, *rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_micro_batches_have_every_row_once_and_at_most_max_tokens(llama, monkeypatch):
    prompts, responses = ragged_rows(4, rows=20)
    prompts[10:] = prompts[:10]  # two responses to each
    for padded in (False, True):
        monkeypatch.setattr(log_probs_module, "can_pack", lambda model, packs=not padded: packs)
        batches = micro_batches(llama, prompts, responses, 40)
        assert sorted(i for batch in batches for i in batch) == list(range(20))
        for batch in batches:
            longest = max(len(prompts[i]) + len(responses[i]) for i in batch)
            once = sum(map(len, {tuple(prompts[i]) for i in batch})) + sum(len(responses[i]) for i in batch)
            assert (longest * len(batch) if padded else once) <= 40 or len(batch) == 1
        if not padded:
            pairs = [batch for batch in batches if 3 in batch or 13 in batch]
            assert len(pairs) == 1, "the responses to a prompt stay together where they fit"


def test_logits_are_computed_at_response_positions_only(llama):
    lengths = []
    handle = llama.lm_head.register_forward_hook(lambda _m, inputs, _o: lengths.append(inputs[0].shape[1]))
    prompts, responses = ragged_rows(5)
    token_log_probs(llama, prompts, responses)
    handle.remove()
    assert sum(lengths) == sum(len(response) for response in responses)
    # the model works as before afterwards
    assert llama(input_ids=torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, VOCABULARY)


def test_logits_are_held_for_as_many_tokens_as_the_gpu_has_memory_for(llama):
    assert logit_tokens(49_152, None) == 682
    assert logit_tokens(152_064, 80e9) == 2740  # logits, softmax and gradient take 5 GB
    assert logit_tokens(152_064, 8e9) == 274
    assert logit_tokens(152_064, 4e9) == 256  # smaller chunks would spend their time on casting weights
    assert logit_tokens(1000, 80e9) == 4096
    chunks = []
    handle = llama.lm_head.register_forward_hook(lambda _m, inputs, _o: chunks.append(inputs[0].shape[1]))
    with planned_device("cuda", 1e6), torch.no_grad():
        token_log_probs(llama, [[3]] * 10, [[4] * 30] * 10)
    handle.remove()
    assert chunks == [256, 44]


def test_only_empty_responses(llama):
    log_probs = token_log_probs(llama, [[3], [4]], [[], []])
    assert [x.shape for x in log_probs] == [(0,), (0,)] and log_probs[0].requires_grad


@pytest.mark.parametrize(
    ("prompts", "responses", "temperature"),
    [([[]], [[3]], 1.0), ([[3]], [[3], [4]], 1.0), ([[3]], [[4]], 0.0), ([[3] * 60], [[4] * 5], 1.0)],
)
def test_bad_rows_are_refused(llama, prompts, responses, temperature):
    with pytest.raises(ValueError):
        token_log_probs(llama, prompts, responses, temperature)
