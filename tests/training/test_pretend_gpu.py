"""Training on the pretend GPU, with evaluations, checkpoints and resume: no tensor is on the wrong device."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch

import gspo_implementation
from gspo.policy import log_probs, rollout
from gspo.policy.model_loader import load_model
from gspo.policy.rollout import Sampling, TransformersEngine
from support.device_rules import ALLOWED, FORBIDDEN, MISMATCH
from support.models import FAMILIES, make_model
from support.pretend_gpu import NAME, DeviceTensor, pretend_gpu
from support.records import record_of, weights_of_run
from support.runs import EVAL, TRAIN, new_trainer, whole_and_resumed
from support.synchronisations import count_synchronisations

# Two rollout batches of two updates each, a checkpoint after each, and an evaluation before and after them.
SHORT = {
    "num_epochs": 1, "batch_size": 2, "group_size": 2, "max_new_tokens": 5, "eval_samples": 2,
    "eval_frequency": 0, "save_frequency": 1, "temperature": 2.0,  # so that the responses of a group differ
}  # fmt: skip
FEW_TRAIN, FEW_EVAL = TRAIN[:4], EVAL[:2]


@pytest.fixture
def device():
    with pretend_gpu() as device:
        yield device


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_gives_the_cpus_values(device, name):
    values = torch.tensor([2.0, 0.0, 1.0])
    expected = ALLOWED[name](values.clone(), torch.arange(3.0))
    result = ALLOWED[name](values.to(device), torch.arange(3.0))
    assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_cuda_forbids_is_an_error(device, name):
    with pytest.raises(RuntimeError, match=MISMATCH):
        FORBIDDEN[name](torch.arange(3.0, device=device), torch.arange(3.0))


def test_values_leave_the_device_only_if_they_are_asked_for(device):
    x = torch.arange(3.0, device=device)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    assert x.tolist() == [0.0, 1.0, 2.0] and x.sum().item() == 3.0 and x.cpu().numpy()[2] == 2.0
    assert type(x.cpu()) is torch.Tensor and isinstance(x, DeviceTensor) and x.device == device


def test_copies_and_files_keep_values_and_ties(device):
    model, _ = load_model("tiny", device="cpu")
    copied = copy.deepcopy(model.to(device))
    for each in (model, copied):
        assert each.get_input_embeddings().weight is each.get_output_embeddings().weight
        assert {parameter.device for parameter in each.parameters()} == {device}
    copied.get_input_embeddings().weight.data.zero_()
    assert model.get_input_embeddings().weight.abs().sum() > 0
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    assert all(torch.equal(loaded[name], x.cpu()) for name, x in model.state_dict().items())


def test_autocast_casts_what_cudas_does(device):
    x = torch.rand(4, 4, device=device, requires_grad=True)
    with torch.autocast(NAME, torch.bfloat16):
        product = x @ x
        assert product.dtype == torch.bfloat16
        assert (product + product).dtype == torch.bfloat16 and (product + x).dtype == torch.float32
        for float32 in (product.softmax(-1), product.exp(), product.sum(), product.cumsum(0)):
            assert float32.dtype == torch.float32
        attended = torch.nn.functional.scaled_dot_product_attention(x[None], product[None], product[None])
        assert attended.dtype == torch.bfloat16
        with torch.autocast(NAME, enabled=False):
            assert (x @ x).dtype == torch.float32
        assert (x.double() @ x.double()).dtype == torch.float64
    product.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.device == device


@pytest.mark.parametrize(
    "name, dtype, checkpointing",
    [
        ("tiny", "float32", True),
        ("tiny", "bfloat16", False),
        ("tiny-moe", "float32", False),
        pytest.param("tiny-moe", "bfloat16", True, marks=pytest.mark.slow),
    ],
)
def test_a_whole_run_and_a_resumed_one(device, tmp_path, name, dtype, checkpointing):
    settings = {**SHORT, "name": name, "device": "cuda", "dtype": dtype}
    settings["gradient_checkpointing"] = checkpointing
    t, whole, resumed = whole_and_resumed(tmp_path, FEW_TRAIN, FEW_EVAL, **settings)
    stored = load_model(str(whole / "final_model"), device="cpu")[0].state_dict()
    assert (whole / "best_model" / "model.safetensors").exists()
    for parameter_name, parameter in t.model.named_parameters():
        assert parameter.device == t.processes.device == device
        assert torch.equal(stored[parameter_name], parameter.detach().cpu())
        assert {x.device for x in t.optimizer.state[parameter].values()} == {device}
    assert record_of(resumed) == record_of(whole)
    assert weights_of_run(resumed) == weights_of_run(whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_samples_and_learns_on_the_device(device, family):
    """Prompts of different lengths, two responses each: packed rows, or padded ones where they must be."""
    prompts = [[5, 9, 4, 30, 8, 7, 11], [3, 50, 6]]
    end_id = SimpleNamespace(eos_token_id=2, decode=lambda ids, skip_special_tokens: "")
    values, gradients = [], []
    for target in ("cpu", device):
        model = make_model(family).to(target)
        rollouts = TransformersEngine(model, end_id).generate(prompts, 2, Sampling(max_new_tokens=6, seed=1))
        rows = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
        computed = torch.cat(log_probs.token_log_probs(model, *rows))
        computed.sum().backward()
        values.append((rows, computed.detach().cpu()))
        gradients.append([p.grad.cpu() for p in model.parameters() if p.grad is not None])
    assert values[0][0] == values[1][0]
    torch.testing.assert_close(values[0][1], values[1][1], rtol=1e-4, atol=1e-4)
    for on_cpu, on_device in zip(*gradients, strict=True):
        assert (on_cpu - on_device).norm() <= 1e-3 * on_cpu.norm() + 1e-4


def sum_of_characters(asked, responses):
    """A reward that nearly always differs between two responses, and needs no random numbers."""
    return [sum(map(ord, response)) % 97 / 97 for response in responses]


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_a_batch_is_the_cpus_but_for_rounding(device, tmp_path, name):
    settings = {**SHORT, "name": name, "reward_fn": sum_of_characters}
    on_gpu, on_cpu = (
        new_trainer(tmp_path, device=target, **settings).train_step(FEW_TRAIN[:2])
        for target in ("cuda", "cpu")
    )
    for metric in ("loss", "grad_norm", "kl", "entropy", "reward_mean", "clip_fraction"):
        assert on_gpu[metric] == pytest.approx(on_cpu[metric], rel=1e-3, abs=1e-7), metric
    assert on_gpu["grad_norm"] > 0 and on_gpu["kl"] > 0


def _rows_on_the_cpu(rows, device):
    return PAD([row.cpu() for row in rows], torch.device("cpu"))


def _drawn_with_numbers_on_the_cpu(logits, temperature, uniform):
    return DRAW(logits, temperature, uniform.cpu())


def _packed_on_the_cpu(groups, device):
    return PACKED(groups, torch.device("cpu"))


PAD, DRAW, PACKED = gspo_implementation._pad, rollout.draw_tokens, log_probs.PackedGroups


@pytest.mark.parametrize(
    "module, function, mistaken",
    [
        (gspo_implementation, "_pad", _rows_on_the_cpu),
        (rollout, "draw_tokens", _drawn_with_numbers_on_the_cpu),
        (log_probs, "PackedGroups", _packed_on_the_cpu),
    ],
)
def test_a_forgotten_device_is_an_error(device, tmp_path, monkeypatch, module, function, mistaken):
    t = new_trainer(tmp_path, device="cuda", **SHORT)
    t.train_step(FEW_TRAIN[:2])
    monkeypatch.setattr(module, function, mistaken)
    with pytest.raises(RuntimeError, match="same device"):
        t.train_step(FEW_TRAIN[:2])


# What a GPU makes the CPU wait for: (reads, uploads) of each.
COUNTED = {
    "item": (lambda x: x.sum().item(), 1, 0),
    "if": (lambda x: bool(x.sum() > 0), 1, 0),
    "tolist": (lambda x: x.tolist(), 1, 0),
    "cpu": (lambda x: x.cpu(), 1, 0),
    "copy_ to the CPU": (lambda x: torch.zeros(3).copy_(x), 1, 0),
    "nonzero": (lambda x: x.nonzero(), 1, 0),
    "unique": (lambda x: x.unique(), 1, 0),
    "a mask": (lambda x: x[x > 0], 1, 0),
    "repeats": (lambda x: x.repeat_interleave(x.long()), 1, 0),
    "repeats of known length": (lambda x: x.repeat_interleave(x.long(), output_size=3), 0, 0),
    "to": (lambda x: torch.zeros(3).to(x.device), 0, 1),
    "to, without waiting": (lambda x: torch.zeros(3).to(x.device, non_blocking=True), 0, 0),
    "tensor": (lambda x: torch.tensor([1.0], device=x.device), 0, 1),
    "an empty tensor": (lambda x: torch.tensor([], device=x.device), 0, 0),
    "an index of the CPU": (lambda x: x[torch.tensor([0])], 0, 1),
    "an index of the device": (lambda x: x[x.long()], 0, 0),
    "arithmetic": (lambda x: (x * 2 + torch.zeros_like(x) + 1.0).to(torch.bfloat16).softmax(-1), 0, 0),
    "the CPU by itself": (lambda x: torch.zeros(3).nonzero().tolist(), 0, 0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_synchronisations_are_counted(device, name):
    work, reads, uploads = COUNTED[name]
    x = torch.arange(3.0, device=device)
    with count_synchronisations() as outer, count_synchronisations() as counted:
        work(x)
    work(x)
    assert (counted.reads.total(), counted.uploads.total()) == (reads, uploads) and counted == outer


def test_synchronisations_have_their_place(device, tmp_path):
    t = new_trainer(tmp_path, device="cuda", **SHORT)
    with count_synchronisations() as counted:
        t.train_step(FEW_TRAIN[:2])
    assert any(place.startswith("gspo/policy/rollout.py:") for place in counted.reads)
    assert any(place.startswith("gspo_implementation.py:") for place in counted.reads)
