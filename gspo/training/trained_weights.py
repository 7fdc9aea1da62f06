"""What is trained of a model, with which optimizer, and how it is saved and loaded.

A trainer and a run know only TrainedWeights. `trained_weights` makes it from the configuration.
"""

import importlib.util
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gspo.policy.gradient_checkpointing import enable_gradient_checkpointing
from gspo.policy.saved_model import load_weights, save_model
from gspo.policy.sharded_model import Sharding, is_first_process, shard_model, whole_tensor
from gspo.training.adamw_8bit import AdamW8bit
from gspo.training.checkpoints import MOMENTS, WEIGHTS, read_moments, write_moments
from gspo.training.config import GSPOConfig
from gspo.training.sharded_checkpoint import (
    by_index,
    by_name,
    empty_like_part,
    load_parts,
    save_parts,
    sharded_like,
    whole_moments,
)


class TrainedWeights(Protocol):
    """The policy, and what of it is trained. All processes call its methods together; the first one writes.

    Attributes:
        model: the policy, on the device, in evaluation mode.
        parameters: those that are trained.
        optimizer: makes their updates.
    """

    model: Any
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    def starting_model(self) -> AbstractContextManager[Any]:
        """The model as it was before training, for the KL term; without gradients."""

    def save_checkpoint(self, folder: Path) -> None:
        """Write into a folder the trained weights exactly, and the optimizer's moments."""

    def load_checkpoint(self, folder: Path) -> None:
        """Take the trained weights of save_checkpoint(), by any number of processes."""

    def load_moments(self, folder: Path) -> dict:
        """The moments of save_checkpoint(), as the "state" of the optimizer's state_dict()."""

    def save_model(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the trained model into a folder that from_pretrained loads, in the type that it came in."""

    def save_update(self, folder: Path, dtype: torch.dtype) -> None:
        """Write into a folder what training changes, for a server that has the rest: weights in this type."""


def trained_weights(
    model: Any, config: GSPOConfig, device: torch.device, sharding: Sharding | None = None
) -> TrainedWeights:
    """Prepare a model for training on a device as the resolved configuration says. The model is changed.

    sharding: how its weights are sharded over processes; None: all are on this device.

    Raises:
        ValueError: the model has LoRA adapters already, or peft is not installed.
    """
    if config.lora_rank and importlib.util.find_spec("peft") is None:
        raise ValueError("--lora_rank needs peft, which is not installed: run python setup.py")
    if any(".lora_A." in name for name, _ in model.named_parameters()):
        raise ValueError("the model has LoRA adapters already, perhaps from an earlier trainer: load it anew")
    if config.lora_rank:
        return Adapters(model, config, device, sharding)
    return AllWeights(model, config, device, sharding)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients together, in float32 whatever their type. Collective if they are sharded."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return whole_tensor(torch.linalg.vector_norm(torch.stack(norms)))


class AllWeights:
    """All weights: in float32, trained by AdamW, or in bfloat16, trained by AdamW8bit."""

    def __init__(self, model: Any, config: GSPOConfig, device: torch.device, sharding: Sharding | None):
        self._sharding = sharding
        self.saved_dtype: torch.dtype = model.dtype
        in_8_bits = config.optimizer == "adamw_8bit"
        weight_type = torch.bfloat16 if in_8_bits else torch.float32
        self.model = _prepare(model, device, weight_type) if sharding is None else model.eval()
        self._start = deepcopy(self.model).requires_grad_(False) if config.kl_coef else None
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)
        prepare = partial(_prepare_unit, device=device, dtype=weight_type)
        for sharded in (self.model, self._start):
            if sharding is not None and sharded is not None:
                shard_model(sharded, sharding, getattr(torch, str(config.dtype)), prepare)
        self.parameters = list(self.model.parameters())
        if in_8_bits:
            self.optimizer: torch.optim.Optimizer = AdamW8bit(
                self.parameters, config.learning_rate, weight_decay=config.weight_decay, seed=config.seed
            )
        else:
            self.optimizer = _adamw(self.parameters, config)

    @contextmanager
    def starting_model(self) -> Iterator[Any]:
        assert self._start is not None, "it is kept only for a KL term"
        yield self._start

    def save_checkpoint(self, folder: Path) -> None:
        moments = self.optimizer.state_dict()["state"]
        if self._sharding is None:
            save_model(self.model, folder)
            if is_first_process():
                write_moments(folder, moments)
            return
        assert not self.model.weights_are_gathered, "they are in the compute type"
        save_parts(dict(self.model.named_parameters()), folder / WEIGHTS, self._sharding)
        save_parts(by_name(moments), folder / MOMENTS, self._sharding)
        self._sharding.on_first_process(self.model.config.save_pretrained, folder)

    def load_checkpoint(self, folder: Path) -> None:
        if not (folder / WEIGHTS).is_dir():
            load_weights(self.model, folder)
            return
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            load_parts(folder / WEIGHTS, lambda name, *_: own[name], self._sharding)

    def load_moments(self, folder: Path) -> dict:
        if not (folder / MOMENTS).is_dir():
            moments = read_moments(folder, lazily=self.parameters[0].device.type != "cpu")
            return sharded_like(moments, self.parameters)

        def target(name: str, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
            return empty_like_part(self.parameters[int(name.partition(".")[0])], size, dtype)

        return by_index(load_parts(folder / MOMENTS, target, self._sharding))

    def save_model(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        save_model(self.model, folder, dtype or self.saved_dtype)

    def save_update(self, folder: Path, dtype: torch.dtype) -> None:
        save_model(self.model, folder, dtype)


class Adapters:
    """LoRA adapters in float32, trained by AdamW. The model's own weights are frozen.

    These weights are in bfloat16 where that is the compute type, which rounds those of a model that came in
    float32 once, before training; else they are in float32. A checkpoint holds the adapters alone.
    save_model() writes the sum of both, and the adapters beside it in adapter/.
    """

    def __init__(self, model: Any, config: GSPOConfig, device: torch.device, sharding: Sharding | None):
        from gspo.policy import lora  # here, since peft takes seconds to import

        self._lora, self._sharding = lora, sharding
        self.saved_dtype: torch.dtype = model.dtype
        weight_type = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self.model = _prepare(model, device, weight_type) if sharding is None else model.eval()
        assert config.lora_rank is not None
        self._adapter_config = lora.add_adapters(self.model, config.lora_rank, config.seed, config.model_name)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)
        if sharding is not None:
            kept = set(lora.adapter_weights(self.model).values())
            prepare = partial(_prepare_unit, device=device, dtype=weight_type, kept=kept)
            shard_model(self.model, sharding, prepare=prepare)  # its weights are in the compute type
        self.parameters = list(lora.adapter_weights(self.model).values())
        self.optimizer: torch.optim.Optimizer = _adamw(self.parameters, config)

    def starting_model(self) -> AbstractContextManager[Any]:
        return self._lora.adapters_off(self.model)

    def save_checkpoint(self, folder: Path) -> None:
        moments = whole_moments(self.optimizer.state_dict()["state"])
        # From here on, the first process writes, and no other one waits for it.
        self._lora.save_adapters(self.model, self._adapter_config, folder)
        if is_first_process():
            write_moments(folder, moments)

    def load_checkpoint(self, folder: Path) -> None:
        self._lora.load_adapters(self.model, folder)

    def load_moments(self, folder: Path) -> dict:
        return sharded_like(read_moments(folder, lazily=False), self.parameters)

    def save_model(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        if self._sharding is None and not is_first_process():
            return
        merged = self._lora.merged_model(self.model, dtype or self.saved_dtype)
        # From here on, the first process writes, and no other one waits for it.
        self._lora.save_adapters(self.model, self._adapter_config, folder / "adapter")
        if merged is not None:
            save_model(merged, folder)

    def save_update(self, folder: Path, dtype: torch.dtype) -> None:
        self._lora.save_adapters(self.model, self._adapter_config, folder)


def _prepare(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model on the device in evaluation mode, with weights in this type, bfloat16 or float32."""
    if dtype == torch.float32:
        # On the device, parameter by parameter: each is freed in its old type.
        return model.to(device).float().eval()
    # Only the parameters, since buffers such as the frequencies of rotary positions need float32. Before
    # the model is moved, so that the device never holds it in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model.to(device).eval()


def _prepare_unit(
    unit: nn.Module, device: torch.device, dtype: torch.dtype, kept: Collection[nn.Parameter] = ()
) -> None:
    """_prepare() of the weights in a unit that are not sharded yet. Those in `kept` keep their type."""
    for module in unit.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                moved = parameter.data.to(device)
                parameter.data = moved if parameter in kept else moved.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            widens = dtype == torch.float32 and buffer.is_floating_point()
            setattr(module, name, (buffer.float() if widens else buffer).to(device))


def _adamw(parameters: list[nn.Parameter], config: GSPOConfig) -> torch.optim.AdamW:
    assert config.learning_rate is not None  # resolve() has decided it
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
