"""Which model a GPU gets, which is refused, and the estimate behind both, against measured updates."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train_gspo
from gspo.policy import model_loader
from gspo.policy.memory import (
    AUTO_MODELS,
    EMBEDDED_SHAPE,
    Workload,
    auto_model_name,
    fits,
    refuse_too_large,
    shape_of,
    training_memory,
)
from gspo.policy.model_cache import EMBEDDED_NAME
from gspo.policy.model_loader import model_shape
from gspo.training.config import GSPOConfig
from gspo.training.hardware import workload
from support.models import make_model
from train_gspo import parse, resolve_for_machine

GPUS = (8, 12, 16, 24, 40, 48, 80, 141, 192)
QWEN = "Qwen/Qwen2.5-{}-Instruct"


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that makes torch see a GPU of so many bytes."""

    def see(total_memory):
        properties = SimpleNamespace(name="A GPU", total_memory=total_memory)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    return see


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub, which has the four models that `auto` chooses from."""

    def shape(name, trust_remote_code=False):
        return AUTO_MODELS[name] if name in AUTO_MODELS else model_shape(name)

    monkeypatch.setattr(model_loader, "model_shape", shape)


# Storages alive, in GB, when an update of Qwen2.5's shapes is at its peak, in padded rows of 512 tokens with
# moments and gradients from an update before: counted under FakeTensorMode.
@pytest.mark.parametrize(
    "size, rows, settings, measured",
    [
        ("0.5B", 4, {}, 13.06),
        ("0.5B", 8, {}, 16.56),
        ("0.5B", 8, {"gradient_checkpointing": True}, 9.57),
        ("0.5B", 4, {"bfloat16": False}, 15.26),
        ("1.5B", 8, {}, 43.24),
        ("3B", 4, {}, 68.65),
        ("3B", 8, {"gradient_checkpointing": True}, 57.15),
        ("7B", 4, {}, 154.12),
    ],
)
def test_the_estimate_is_near_what_an_update_was_measured_to_hold(size, rows, settings, measured):
    work = Workload(updated_rows=rows, **settings)
    parts = training_memory(AUTO_MODELS[QWEN.format(size)], work)
    del parts["reserve"]
    estimate = sum(parts.values()) / 1e9
    assert 0.99 * measured < estimate < (1.15 if work.gradient_checkpointing else 1.05) * measured


def test_each_setting_counts():
    shape = AUTO_MODELS[QWEN.format("0.5B")]

    def total(**settings):
        return sum(training_memory(shape, Workload(**settings)).values())

    assert total(reference=True) == total() + 4 * shape.parameters
    assert total(micro_batch_tokens=2048) < total()
    # A pass takes a whole row, whatever the setting, and never more than an update has.
    assert total(micro_batch_tokens=1) == total(micro_batch_tokens=512)
    assert total(micro_batch_tokens=10**6) == total(micro_batch_tokens=8 * 512) == total()
    assert "activations of 4096 tokens" in training_memory(shape, Workload())
    # Of large rows and short passes, sampling is the peak.
    sampling = Workload(max_length=8192, micro_batch_tokens=1, gradient_checkpointing=True, sampled_rows=128)
    assert "keys and values of 128 responses" in training_memory(shape, sampling)


def test_the_defaults_are_those_of_a_run():
    assert workload(GSPOConfig()) == Workload()
    assert workload(GSPOConfig(kl_coef=0.1, dtype="float32", group_size=200)) == Workload(
        updated_rows=200, sampled_rows=200, reference=True, bfloat16=False
    )


def test_shapes_are_read_from_configurations():
    gpt2 = make_model("gpt2")
    shape = shape_of(gpt2.config, gpt2.num_parameters())
    assert (shape.layers, shape.hidden, shape.intermediate, shape.kv_width) == (2, 32, 128, 32)
    experts = model_shape("tiny-moe")
    assert (experts.layers, experts.intermediate, experts.kv_width) == (4, 2 * 24, 64)


# Cards have 1 to 3 % less than so many GiB.
@pytest.mark.parametrize(
    "gb, size",
    [
        (8, None), (12, None), (16, None), (24, "0.5B"), (40, "0.5B"), (48, "1.5B"), (80, "3B"), (141, "3B"),
        (192, "7B"),
    ],
)  # fmt: skip
def test_the_model_that_each_gpu_gets(gb, size):
    expected = QWEN.format(size) if size else EMBEDDED_NAME
    assert auto_model_name(0.98 * gb * 2**30, Workload()) == expected


@pytest.mark.parametrize("gb", (2, *GPUS))
@pytest.mark.parametrize(
    "flags", [[], ["--kl_coef", "0.1"], ["--gradient_checkpointing"], ["--max_length", "8192"]]
)
def test_what_auto_takes_is_never_refused(gb, flags, gpu, hub, capsys):
    gpu(gb * 10**9)
    taken = resolve_for_machine(parse(flags))
    assert taken.device == "cuda" and f"model: {taken.model_name} (" in capsys.readouterr().out
    # A resumed run names the model.
    again = resolve_for_machine(parse([*flags, "--model_name", taken.model_name]))
    assert again.model_name == taken.model_name


def test_on_the_cpu_auto_takes_the_embedded_model_whatever_the_gpu(gpu, capsys):
    gpu(192 * 10**9)
    assert resolve_for_machine(parse(["--device", "cpu"])).model_name == EMBEDDED_NAME


def settings_in(remedy):
    """The settings that a remedy changes, and the model it names."""
    changes = {
        name: int(value) for name, value in re.findall(r"--(micro_batch_tokens|max_length) (\d+)", remedy)
    }
    if "--gradient_checkpointing" in remedy:
        changes["gradient_checkpointing"] = True
    named = re.search(r"--model_name (\S+)", remedy)
    return changes, named and named[1]


@pytest.mark.parametrize("gb", GPUS)
@pytest.mark.parametrize("name", AUTO_MODELS)
@pytest.mark.parametrize("work", [Workload(), Workload(max_length=4096), Workload(reference=True)])
def test_a_refusal_names_what_fits_and_nothing_else(name, gb, work):
    gpu_bytes, shape = 0.98 * gb * 2**30, AUTO_MODELS[name]
    if fits(shape, work, gpu_bytes):
        return refuse_too_large(name, shape, work, gpu_bytes)
    with pytest.raises(ValueError) as refusal:
        refuse_too_large(name, shape, work, gpu_bytes)
    said = str(refusal.value)
    assert "\n" not in said and f"--model_name {name}: training needs" in said
    assert f"this GPU has {gpu_bytes / 1e9:.1f} GB; it fits with " in said
    named = said.partition("it fits with ")[2].split(" or ")
    for remedy in named:
        changes, smaller = settings_in(remedy)
        if remedy != "--device cpu":
            model = {**AUTO_MODELS, EMBEDDED_NAME: EMBEDDED_SHAPE}[smaller or name]
            assert changes or smaller
            assert fits(model, replace(work, **changes), gpu_bytes)
    # What would fit is named.
    checkpointed = replace(work, gradient_checkpointing=True)
    assert ("--gradient_checkpointing" in named) == fits(shape, checkpointed, gpu_bytes)
    shortest = replace(work, micro_batch_tokens=work.max_length)
    assert any(remedy.startswith("--micro_batch_tokens") for remedy in named) == fits(
        shape, shortest, gpu_bytes
    )


def test_a_refusal_from_the_command_line(gpu, hub, capsys):
    gpu(80 * 10**9)
    assert train_gspo.main(["--model_name", QWEN.format("3B"), "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "train_gspo.py: --model_name Qwen/Qwen2.5-3B-Instruct: training needs 82.1 GB of GPU memory (55.5 GB "
        "weights, gradients, moments and bfloat16 copies, 24.3 GB activations of 4096 tokens, 2.2 GB reserve)"
        ", this GPU has 80.0 GB; it fits with --micro_batch_tokens 2048 or --gradient_checkpointing or "
        "--max_length 256 or --model_name Qwen/Qwen2.5-1.5B-Instruct\n"
    )
