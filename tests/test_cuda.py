"""Training and log-probabilities on a GPU. These tests are skipped where there is none."""

import pytest
import torch

from gspo.checks import float64_reference as reference
from gspo.policy import log_probs
from gspo.policy.log_probs import token_log_probs
from support.device_rules import ALLOWED, FORBIDDEN, MISMATCH
from support.models import FAMILIES, make_model
from support.records import record_of, weights_of_run
from support.runs import EVAL, TRAIN, whole_and_resumed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")

# Four prompts of different lengths, the first of which has three responses.
PROMPTS = [[5, 9, 4, 30, 8, 7, 11], [5, 9, 4, 30, 8, 7, 11], [5, 9, 4, 30, 8, 7, 11], [3], [50, 6], [9] * 12]
RESPONSES = [[4, 8, 15, 16, 23, 42], [7], [12, 13, 2], [20, 2], [30, 31, 32, 33], []]


@pytest.fixture
def deterministic(monkeypatch):
    """Without it, sums of gradients depend on which of a GPU's threads comes first."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_a_resumed_run_is_the_uninterrupted_one(deterministic, tmp_path, name, dtype):
    settings = {"name": name, "dtype": dtype, "device": "cuda", "num_epochs": 1, "temperature": 2.0}
    t, whole, resumed = whole_and_resumed(tmp_path, TRAIN, EVAL, **settings)
    assert t.processes.device.type == "cuda" == next(t.model.parameters()).device.type
    assert record_of(resumed) == record_of(whole)
    assert weights_of_run(resumed) == weights_of_run(whole)


def values_and_gradient(model):
    """Log-probabilities of all response tokens, and the gradient of their weighted sum, on the CPU."""
    model.zero_grad()
    values = torch.cat(token_log_probs(model, PROMPTS, RESPONSES, temperature=0.7))
    (values * torch.linspace(-1, 1, len(values), device=values.device)).sum().backward()
    gradient = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return values.detach().cpu().double(), torch.cat(gradient).cpu().double()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_float64_on_the_cpu(family):
    model = make_model(family).double()
    model.config._experts_implementation = "eager"  # the only one in float64
    rows = [(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True) if r]
    exact = torch.cat([reference.token_log_probs(model, p, r, 0.7) for p, r in rows])
    (exact * torch.linspace(-1, 1, len(exact), dtype=torch.float64)).sum().backward()
    exact_gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    values, gradient = values_and_gradient(make_model(family).cuda())
    torch.testing.assert_close(values, exact.detach(), rtol=1e-4, atol=1e-4)
    assert (gradient - exact_gradient).norm() / exact_gradient.norm() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_what_padded_ones_give(family, monkeypatch):
    model = make_model(family).cuda()
    packed = values_and_gradient(model)
    monkeypatch.setattr(log_probs, "can_pack", lambda model: False)
    padded = values_and_gradient(model)
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-4, atol=1e-4)
    assert (packed[1] - padded[1]).norm() / padded[1].norm() < 1e-3


@pytest.mark.parametrize("name", ALLOWED)
def test_the_pretend_gpu_allows_what_cuda_allows(name):
    ALLOWED[name](torch.tensor([2.0, 0.0, 1.0], device="cuda"), torch.arange(3.0))


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_pretend_gpu_forbids_what_cuda_forbids(name):
    with pytest.raises(RuntimeError, match=MISMATCH):
        FORBIDDEN[name](torch.arange(3.0, device="cuda"), torch.arange(3.0))
