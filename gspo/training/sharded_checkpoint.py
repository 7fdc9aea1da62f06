"""Tensors of which each process has a part, in a folder from which any number of processes can read them.

torch.distributed.checkpoint writes a file for each process, and .metadata, which says what is where.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, empty

from gspo.policy.sharded_model import Sharding, copy_whole, whole_tensor

Target = Callable[[str, torch.Size, torch.dtype], torch.Tensor]


def save_parts(tensors: Mapping[str, torch.Tensor], folder: Path, sharding: Sharding) -> None:
    """Write this process's part of the tensors; collective.

    Args:
        tensors: sharded ones, and others that all processes have, under the same names everywhere.
        sharding: of all of them.

    Raises:
        OSError: in all processes, if one could not write its part.
    """
    sharding.on_first_process(folder.mkdir)
    seen = [None] * distributed.get_world_size()
    distributed.all_gather_object(seen, folder.is_dir(), sharding.objects)
    if not all(seen):  # the library would make one of this name on every machine
        raise OSError(
            f"not all processes see {folder}: --output_dir must be on a disk that all machines share"
        )
    with _plain_errors(folder):
        dcp.save(dict(tensors), checkpoint_id=folder, process_group=sharding.objects)


def load_parts(folder: Path, target: Target, sharding: Sharding | None) -> dict[str, torch.Tensor]:
    """Read the tensors of save_parts(), by name; collective if `sharding` is given.

    Args:
        target: gives the tensor to read one into, by its name, size and type; a sharded one takes its part.
        sharding: of the tensors to read into; None: this process reads alone.

    Raises:
        OSError: they cannot be read.
    """
    with _plain_errors(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is to be
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors = {name: target(name, about.size, about.properties.dtype) for name, about in saved.items()}
        group = None if sharding is None else sharding.objects
        dcp.load(tensors, checkpoint_id=folder, process_group=group, no_dist=group is None)
    return tensors


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """Turn the library's error, which holds those of all processes, into an OSError of one line."""
    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise OSError(f"{folder}: {first}") from error


# ---- an optimizer's moments: the "state" of its state_dict(), index of a parameter to tensors by name


def by_name(moments: Mapping[int, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Moments as tensors under names such as 3.exp_avg. An integer is a tensor, too."""
    return {
        f"{index}.{name}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for index, state in moments.items()
        for name, value in state.items()
    }


def by_index(tensors: Mapping[str, torch.Tensor]) -> dict[int, dict[str, Any]]:
    """The moments of by_name()."""
    moments: dict[int, dict[str, Any]] = {}
    for full_name, tensor in tensors.items():
        index, _, name = full_name.partition(".")
        is_integer = tensor.dim() == 0 and tensor.dtype == torch.int64
        moments.setdefault(int(index), {})[name] = tensor.item() if is_integer else tensor
    return moments


def empty_like_part(parameter: torch.Tensor, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor for a moment of a parameter; sharded as the parameter is, if both have the same rows."""
    if isinstance(parameter, DTensor) and _has_rows_of(parameter, size):
        return empty(size, dtype=dtype, device_mesh=parameter.device_mesh, placements=parameter.placements)
    return torch.empty(size, dtype=dtype)


def sharded_like(moments: Mapping[int, Mapping[str, Any]], parameters: Sequence[torch.Tensor]) -> dict:
    """Whole moments, sharded as the parameters are."""

    def sharded(parameter: torch.Tensor, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and isinstance(parameter, DTensor):
            if _has_rows_of(parameter, value.shape):
                target = empty_like_part(parameter, value.shape, value.dtype)
                copy_whole(target, value)
                return target
        return value

    return {
        index: {name: sharded(parameters[index], value) for name, value in state.items()}
        for index, state in moments.items()
    }


def whole_moments(moments: Mapping[int, Mapping[str, Any]]) -> dict:
    """Moments of which no tensor is sharded; collective if one is."""
    return {
        index: {
            name: whole_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in state.items()
        }
        for index, state in moments.items()
    }


def _has_rows_of(parameter: torch.Tensor, size: torch.Size) -> bool:
    """True for a moment of the parameter's shape, and for the blocks of each of its rows (AdamW8bit)."""
    return size == parameter.shape or (len(size) == 3 and size[0] == parameter.shape[0])
