"""Training on the pretend GPU: no tensor is on the wrong device, from the first batch to a resumed run's last."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file

import gspo_implementation
from gspo.policy import log_probs, rollout
from gspo.policy.model_loader import load_model
from support.pretend_gpu import NAME, DeviceTensor, pretend_gpu
from support.records import lines_of, record_of, weights_of_run
from support.runs import EVAL, TRAIN, new_trainer, noisy, seed_everything
from support.synchronisations import count_synchronisations

SHORT = {"batch_size": 2, "group_size": 2, "max_new_tokens": 12, "eval_samples": 2, "update_frequency": 2}


@pytest.fixture
def device():
    with pretend_gpu() as device:
        yield device


ALLOWED = {
    "a scalar of the CPU": lambda x, cpu: x + cpu.sum(),
    "a scalar of the CPU as a choice": lambda x, cpu: torch.where(x > 0, x, cpu.sum()),
    "an index of the CPU": lambda x, cpu: x[torch.tensor([0, 1])],
    "writing at an index of the CPU": lambda x, cpu: x.index_put_((torch.tensor([0]),), x[:1]),
    "a copy to the device": lambda x, cpu: x.copy_(cpu),
    "a slice copied to the device": lambda x, cpu: x[:2].copy_(cpu[:2]),
    "a copy to the CPU": lambda x, cpu: cpu.copy_(x),
    "a tensor like one of the device": lambda x, cpu: x + x.new_tensor([1.0, 2.0, 3.0]),
    "a tensor made on the device": lambda x, cpu: x + torch.tensor([1, 2, 3], device=x.device),
    "integers in a histogram": lambda x, cpu: x.int().histc(bins=4, min=0, max=3),
}
FORBIDDEN = {
    "a sum": lambda x, cpu: x + cpu,
    "a sum in place": lambda x, cpu: cpu.add_(x),
    "a sum in place of a scalar": lambda x, cpu: torch.zeros(()).add_(x.sum()),
    "a scalar of the device and the CPU's vector": lambda x, cpu: cpu + x.sum(),
    "a product of matrices": lambda x, cpu: torch.outer(x, x) @ torch.outer(cpu, cpu),
    "an index of the device": lambda x, cpu: cpu[x.long()],
    "writing at an index of the device": lambda x, cpu: cpu.index_put_((x.long(),), cpu),
    "values of the CPU": lambda x, cpu: x.index_put_((x.long(),), cpu),
    "gather": lambda x, cpu: x.gather(0, cpu.long()),
    "index_select": lambda x, cpu: x.index_select(0, cpu.long()),
    "embedding": lambda x, cpu: torch.nn.functional.embedding(cpu.long(), x[:, None]),
    "cat": lambda x, cpu: torch.cat([x, cpu]),
    "stacked scalars": lambda x, cpu: torch.stack([x.sum(), cpu.sum()]),
    "where": lambda x, cpu: torch.where(cpu > 0, x, 0.0),
    "searchsorted": lambda x, cpu: torch.searchsorted(x, cpu),
    "pin_memory": lambda x, cpu: x.pin_memory(),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_gives_the_cpus_values(device, name):
    values = torch.tensor([2.0, 0.0, 1.0])
    expected = ALLOWED[name](values.clone(), torch.arange(3.0))
    result = ALLOWED[name](values.to(device), torch.arange(3.0))
    assert torch.equal(result.cpu(), expected.cpu() if name != "integers in a histogram" else expected)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_cuda_forbids_is_an_error(device, name):
    with pytest.raises(RuntimeError, match=f"same device|cannot be indexed|{NAME}"):
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
        ("tiny-moe", "bfloat16", True),
    ],
)
def test_a_whole_run_and_a_resumed_one(device, tmp_path, name, dtype, checkpointing):
    settings = {**SHORT, "name": name, "dtype": dtype, "gradient_checkpointing": checkpointing}

    def run(folder, reward_fn=noisy, target="cuda", **more):
        t = new_trainer(folder, reward_fn, device=target, **settings, **more)
        return t, t.train(TRAIN[:6], EVAL[:2])

    seed_everything()
    t, result = run(tmp_path / "whole")
    assert result["finished"] and t.processes.device == device
    whole = tmp_path / "whole" / "run"
    stored = load_file(whole / "final_model" / "model.safetensors")
    for parameter_name, parameter in t.model.named_parameters():
        assert parameter.device == device
        assert torch.equal(stored[parameter_name], parameter.detach().cpu())
        assert {x.device for x in t.optimizer.state[parameter].values()} == {device}
    assert load_model(str(whole / "best_model"), device="cpu")

    seed_everything()
    calls = iter(range(100))

    def stops_midway(*args):
        stopped.stop.requested = next(calls) == 4  # the second rollout batch of the second window
        return noisy(*args)

    stopped = new_trainer(tmp_path / "stopped", stops_midway, device="cuda", **settings)
    assert not stopped.train(TRAIN[:6], EVAL[:2])["finished"]
    assert run(tmp_path / "stopped", resume="latest")[1]["finished"]
    assert record_of(tmp_path / "stopped" / "run") == record_of(whole)
    assert weights_of_run(tmp_path / "stopped" / "run") == weights_of_run(whole)


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_the_first_batch_is_the_cpus_but_for_rounding(device, tmp_path, name):
    found = []
    for target in ("cuda", "cpu"):
        t = new_trainer(tmp_path, gspo_reward, name=name, device=target, **SHORT)
        found.append(t.train_step(TRAIN[:2]))
    for metric in ("loss", "grad_norm", "kl", "entropy", "reward_mean"):
        assert found[0][metric] == pytest.approx(found[1][metric], rel=1e-3, abs=1e-7), metric
    assert found[0]["grad_norm"] > 0


def gspo_reward(asked, responses):
    """The share of responses' first half that is digits in order: it needs no random numbers."""
    return [sum(a <= b for a, b in zip(r, r[1:], strict=False)) / 20 for r in responses]


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
    t.train_step(TRAIN[:2])
    monkeypatch.setattr(module, function, mistaken)
    with pytest.raises(RuntimeError, match="same device"):
        t.train_step(TRAIN[:2])


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
        t.train_step(TRAIN[:2])
    assert any(place.startswith("gspo/policy/rollout.py:") for place in counted.reads)
    assert any(place.startswith("gspo_implementation.py:") for place in counted.reads)
