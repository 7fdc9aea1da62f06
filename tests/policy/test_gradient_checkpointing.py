"""Gradient checkpointing: the same gradients, with dropout off."""

import pytest
import torch

from gspo.policy.gradient_checkpointing import enable_gradient_checkpointing
from gspo.policy.log_probs import token_log_probs
from support.models import make_model

PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12]]
RESPONSES = [[13, 14, 15], [16, 17, 18, 19], [20]]


def log_probs_and_gradient(model):
    log_probs = torch.cat(token_log_probs(model, PROMPTS, RESPONSES))
    log_probs.sum().backward()
    gradient = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return log_probs.detach(), torch.cat(gradient)


# gpt2 has modules that apply dropout, and opt has layers that apply it themselves.
@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "opt"])
def test_the_gradients_are_the_same_and_dropout_is_off(family, monkeypatch):
    monkeypatch.setattr("gspo.policy.log_probs.can_pack", lambda model: False)  # the same rows in both
    expected_log_probs, expected_gradient = log_probs_and_gradient(make_model(family))
    model = make_model(family)
    enable_gradient_checkpointing(model)
    layers = [module for module in model.modules() if module.training][-2:]
    assert len(layers) == 2
    calls = []
    for layer in layers:
        next(layer.children()).register_forward_hook(lambda *_: calls.append(1))
    log_probs, gradient = log_probs_and_gradient(model)
    assert torch.equal(log_probs, expected_log_probs)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)
    assert len(calls) == 2 * len(layers), "each layer is computed once more, in backward"


def test_an_older_transformers_is_asked_by_its_own_name():
    class OlderModel(torch.nn.Module):  # transformers 5.17
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
            self.settings = gradient_checkpointing_kwargs

    model = OlderModel()
    enable_gradient_checkpointing(model)
    assert model.settings == {"use_reentrant": False} and not model.training
