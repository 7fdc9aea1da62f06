"""Shard a model's weights over processes (FSDP2), and compute with it as with any other model.

Each process keeps a part of every weight. A layer's weights are gathered when it is computed and given up
after it, and its gradients are summed over the processes, each of which keeps its part. The weights outside
of the layers (embedding, last norm, output layer) are one more unit, which stays whole in a forward pass, and
again in the backward pass.

The unit of the whole model is entered by call(), since log-probabilities do not go through the model's own
forward(). All processes must enter it equally often: each gathering waits for all of them.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from gspo.policy.fewer_layers import decoder_layers

Result = TypeVar("Result")


@dataclass(frozen=True)
class Sharding:
    """The processes over which a model's weights are sharded.

    mesh: (shards,), or (copies, shards) of them.
    objects: the group in which they wait for one another, however long one of them takes.
    """

    mesh: DeviceMesh
    objects: Any

    def on_first_process(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Return work(*arguments) of the first process in all processes, or raise its OSError in all."""
        outcome: list[Any] = [None, None]
        if is_first_process():
            try:
                outcome[0] = work(*arguments)
            except (OSError, RuntimeError, SafetensorError) as failure:  # as libraries raise on a full disk
                outcome[1] = OSError(str(failure))
        distributed.broadcast_object_list(outcome, 0, self.objects)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def shard_model(
    model: Any,
    sharding: Sharding,
    compute_dtype: torch.dtype | None = None,
    prepare: Callable[[nn.Module], None] = lambda unit: None,
) -> None:
    """Shard a model in place: every weight over the last dimension of the mesh, with copies over the first.

    Args:
        model: all processes have the same weights.
        compute_dtype: that of the gathered weights; None: their own. Gradients are summed in float32.
        prepare: called with each unit before it is sharded. It puts the unit's weights on the mesh's device,
            in the type in which they are kept, so that no process has more than a unit of them whole.

    Raises:
        ValueError: a layer has parts that a token may leave out.
    """
    mesh = sharding.mesh
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    layers = layers_of(model)
    for layer in layers:
        _refuse_parts_left_out(model, layer)
    for unit in (*layers, model):
        prepare(unit)
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)  # a sum: the loss has the denominator of all processes
        unit.set_force_sum_reduction_for_comms(True)
    model.call_in_unit = MethodType(_call, model)
    register_fsdp_forward_method(model, "call_in_unit")
    model.weights_are_gathered = False
    model.sharding = sharding
    # The first forward pass makes a unit of the module that it enters: it must be the whole model.
    with torch.no_grad():
        call(model, lambda _: None)
    model.reshard()
    # The log-probabilities of rows are views of one tensor, and nothing is written into them.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")


def _refuse_parts_left_out(model: Any, layer: nn.Module) -> None:
    """Refuse experts that are modules of their own: those without a token have no gradient to be summed.

    Which ones are without differs between processes. In transformers' models they are one tensor.
    """
    for module in layer.modules():
        if isinstance(module, nn.ModuleList) and any(weight.requires_grad for weight in module.parameters()):
            raise ValueError(
                f"--shard full: the layers of {type(model).__name__} have lists of modules, perhaps experts, "
                "of which a process may use some only: give --shard none"
            )


def call(model: Any, function: Callable[..., Result], *arguments: Any) -> Result:
    """Return function(model, *arguments), which may compute with the model's weights.

    Of a sharded model without gathered weights, all processes call this together.
    """
    if not is_sharded(model) or model.weights_are_gathered:
        return function(model, *arguments)
    return model.call_in_unit(function, *arguments)


def _call(model: Any, function: Callable[..., Result], *arguments: Any) -> Result:
    return function(model, *arguments)


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


def layers_of(model: Any) -> list[nn.Module]:
    """Return the layers of a model that is not sharded, which are gathered one by one."""
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    return layers or list(decoder_layers(model) or ())


def units(model: nn.Module) -> list[FSDPModule]:
    """Return the units that are gathered one by one, the whole model's first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def state_by_unit(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Return what state_dict() has, in a dictionary for each unit. Of tied weights the first name alone."""
    names = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    prefixes = ["", *(f"{name}." for name in names if name)]
    state: dict[str, dict[str, torch.Tensor]] = {prefix: {} for prefix in prefixes}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            innermost = next(prefix for prefix in reversed(prefixes) if name.startswith(prefix))
            state[innermost][name] = tensor.detach()
    return [tensors for tensors in state.values() if tensors]


def gather_weights(model: Any) -> None:
    """Keep all weights whole in every process, until release_weights(). Collective.

    The model then computes as any other, without gradients and without waiting for other processes.
    """
    for unit in units(model):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    model.weights_are_gathered = True


def release_weights(model: Any) -> None:
    """Keep a part of the weights only, as training needs it."""
    for unit in units(model):
        unit.reshard()
        if unit is not model:  # the whole model's is to stay through the backward pass
            unit.set_reshard_after_forward(True, recurse=False)
    model.weights_are_gathered = False


@contextmanager
def gathered_weights(model: Any) -> Iterator[None]:
    """gather_weights() for a while, if the model is sharded."""
    if not is_sharded(model):
        yield
        return
    gather_weights(model)
    try:
        yield
    finally:
        release_weights(model)


@torch.no_grad()
def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process keeps: all of it, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor. Of a sharded one, all processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: torch.Tensor) -> int:
    """Return the place of this process's first row among all rows of a tensor."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh = tensor.device_mesh
    dimension = mesh.ndim - 1
    rows_each = -(-len(tensor) // mesh.size(dimension))
    return min(len(tensor), rows_each * mesh.get_local_rank(dimension))


def copy_whole(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values into a tensor of the same shape; into a sharded one, the part that this process keeps."""
    if isinstance(target, DTensor):
        placed = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
        target, values = target.to_local(), placed.to_local()
    with torch.no_grad():
        target.copy_(values)


def plain_class(model: nn.Module) -> Any:
    """Return the class that a model had before it was sharded."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def is_first_process() -> bool:
    """Return whether this process is the one that writes what all have, or the only one."""
    return not distributed.is_initialized() or distributed.get_rank() == 0
