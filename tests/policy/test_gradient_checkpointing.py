"""Gradient checkpointing: the same gradients, with dropout off."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gspo.policy.gradient_checkpointing import enable_gradient_checkpointing
from gspo.policy.group_attention import can_pack, checkpoint_contexts
from gspo.policy.log_probs import token_log_probs
from support.models import make_model

PROMPTS = [[5, 6, 7, 8], [5, 6, 7, 8], [9], [10, 11, 12]]
RESPONSES = [[13, 14, 15], [16, 17], [16, 17, 18, 19], [20]]
# Every prompt once, and the responses without their last tokens, which predict nothing.
PACKED_TOKENS = (4 + 2 + 1) + (1 + 3) + (3 + 0)


def log_probs_and_gradient(model):
    log_probs = torch.cat(token_log_probs(model, PROMPTS, RESPONSES))
    log_probs.sum().backward()
    gradient = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return log_probs.detach(), torch.cat(gradient)


# gpt2 has modules that apply dropout, and opt has layers that apply it themselves.
@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gpt2", "opt", "gemma2"])
def test_the_gradients_are_the_same_and_dropout_is_off(family, packs, monkeypatch):
    if not packs:
        monkeypatch.setattr("gspo.policy.log_probs.can_pack", lambda model: False)
    expected_log_probs, expected_gradient = log_probs_and_gradient(make_model(family))
    model = make_model(family)
    enable_gradient_checkpointing(model)
    layers = [module for module in model.modules() if module.training][-2:]
    assert len(layers) == 2
    tokens = []
    model.get_input_embeddings().register_forward_hook(
        lambda _m, inputs, _o: tokens.append(inputs[0].numel())
    )
    calls = []
    for layer in layers:
        next(layer.children()).register_forward_hook(lambda *_: calls.append(1))
    log_probs, gradient = log_probs_and_gradient(model)
    assert torch.equal(log_probs, expected_log_probs)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)
    assert len(calls) == 2 * len(layers), "each layer is computed once more, in backward"
    assert (sum(tokens) == PACKED_TOKENS) == packs


def test_checkpointing_that_does_not_know_of_packed_rows_excludes_them():
    model = make_model("llama")
    enable_gradient_checkpointing(model)
    assert can_pack(model)
    for module in model.modules():
        if module.training:
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    assert not can_pack(model)
    enable_gradient_checkpointing(model)
    model.train()  # and with it the modules inside the layers, which may apply dropout
    assert not can_pack(model)


def test_passes_before_a_backward_do_not_disturb_it():
    """Each recomputation has the packed row of its own forward pass."""
    expected = log_probs_and_gradient(make_model("llama"))[1]
    model = make_model("llama")
    enable_gradient_checkpointing(model)
    log_probs = torch.cat(token_log_probs(model, PROMPTS, RESPONSES))
    token_log_probs(model, PROMPTS[1:], RESPONSES[1:])
    usual = model.config._attn_implementation
    log_probs.sum().backward()
    assert model.config._attn_implementation == usual == "sdpa"
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_an_older_transformers_is_asked_by_its_own_name():
    class OlderModel(torch.nn.Module):  # transformers 5.17
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
            self.settings = gradient_checkpointing_kwargs

    model = OlderModel()
    enable_gradient_checkpointing(model)
    assert (
        model.settings == {"use_reentrant": False, "context_fn": checkpoint_contexts} and not model.training
    )
