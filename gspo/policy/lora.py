"""LoRA: small trained adapters over a model's frozen weights (arXiv 2106.09685), with the peft library.

    W x + (alpha / r) B A x,     A (r, in) random, B (out, r) zero at the start, both float32

Every linear layer gets an adapter, except the output layer and the routers of a mixture of experts. Where
transformers keeps all experts of a layer in one tensor, these experts stay frozen: peft could adapt such a
tensor, but it adds A and B up to a second tensor of the same size in each forward pass, which is then kept
for the backward pass.

peft takes seconds to import, so this module is imported only where LoRA is used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from gspo.policy.sharded_model import copy_whole, is_first_process, plain_class, whole_tensor

# With alpha / r as the factor, one learning rate suits all ranks ("LoRA Without Regret").
ALPHA = 32
# Linear layers that choose the experts of a token, by the last part of their names.
ROUTERS = {"gate", "router", "shared_expert_gate"}
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER = "default"  # the name that peft gives the only adapter


def add_adapters(model: Any, rank: int, seed: int, base_model: str) -> LoraConfig:
    """Freeze the model and add adapters, which are trained. The model keeps its class.

    Args:
        seed: of the adapters' initial values. The global random generators are left as they are.
        base_model: the name of the model, for the configuration.

    Returns:
        The adapters' configuration.

    Raises:
        ValueError: the model has no linear layer to adapt.
    """
    output_layer = model.get_output_embeddings()
    layers = {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output_layer
    }
    targets = sorted(set(layers) - ROUTERS)
    if not targets:
        raise ValueError(f"--lora_rank {rank}: {base_model} has no linear layers; give --lora_rank 0")
    config = LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules=targets,
        fan_in_fan_out=isinstance(layers[targets[0]], Conv1D),  # its weight is (in, out)
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
    )
    model.requires_grad_(False)
    # On the meta device, where peft's random initial values cost nothing and draw no random numbers. In a
    # holder without a configuration: by theirs, peft would take some mixtures of experts for what they were
    # in transformers 4, and leave their dense layers without an adapter.
    inject_adapter_in_model(config, nn.ModuleDict({"policy": model}), low_cpu_mem_usage=True)
    assert not config.target_parameters, "experts in one tensor stay frozen"
    generator = torch.Generator().manual_seed(seed)
    for layer in _adapted(model):
        device = layer.get_base_layer().weight.device
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        bound = down.in_features**-0.5  # that of nn.Linear, as peft has it
        values = torch.empty(down.weight.shape).uniform_(-bound, bound, generator=generator)
        down.weight = nn.Parameter(values.to(device))
        up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=device))
    model.eval()  # new modules are in training mode
    return config


@contextmanager
def adapters_off(model: Any) -> Iterator[Any]:
    """The model without its adapters."""
    for layer in _adapted(model):
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in _adapted(model):
            layer.enable_adapters(True)


def adapter_weights(model: Any) -> dict[str, nn.Parameter]:
    """The adapters' parameters, by the names that peft gives them in files."""
    return {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def save_adapters(model: Any, config: LoraConfig, folder: Path) -> None:
    """Write the adapters into a folder as peft's PeftModel.from_pretrained loads them.

    Of several processes, the first one writes. If the model is sharded, all of them call this together.
    """
    weights = {
        name: whole_tensor(parameter.detach()).cpu() for name, parameter in adapter_weights(model).items()
    }
    if not is_first_process():
        return
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.target_modules = sorted(
        config.target_modules or ()
    )  # a set, whose order differs between processes
    config.save_pretrained(folder)


def load_adapters(model: Any, folder: Path) -> None:
    """Take the values that save_adapters() wrote, bit for bit."""
    saved, own = load_file(folder / ADAPTER_WEIGHTS), adapter_weights(model)
    assert saved.keys() == own.keys()
    for name, parameter in own.items():
        copy_whole(parameter, saved[name])


def merged_model(model: Any, dtype: torch.dtype) -> Any | None:
    """A model on the CPU, without adapters, whose weights have them added; for saving.

    The sums are made in float32 and rounded once to dtype, one tensor at a time. The model stays as it is.
    The result may share memory with it. If the model is sharded, all processes call this together, and all
    but the first one get None.
    """
    with torch.device("meta"):
        merged = plain_class(model)(deepcopy(model.config))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = {}
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if ".lora_A." in name or ".lora_B." in name:
                continue
            owner, _, last = name.rpartition(".")
            layer = layers.get(owner.removesuffix(".base_layer"))
            values = whole_tensor(values)
            if layer is not None and last == "weight":
                values = values.float() + _product(layer)
            if name in parameters:
                values = values.to(dtype)
            if is_first_process():
                state[name.replace(".base_layer.", ".")] = values.cpu()
    if not is_first_process():
        return None
    merged.load_state_dict(state, assign=True)
    merged.tie_weights()
    merged.generation_config = model.generation_config
    return merged


def _product(layer: LoraLayer) -> torch.Tensor:
    """(alpha / r) B A of a layer, in the shape of its weight."""
    up, down = (whole_tensor(part[ADAPTER].weight) for part in (layer.lora_B, layer.lora_A))
    product = up @ down
    return (product.T if layer.fan_in_fan_out else product) * layer.scaling[ADAPTER]


def _adapted(model: Any) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
