"""Plan a forward pass for a device that is not here.

What a pass does depends on its device in two places: the attention kernel (group_attention.py) and how many
logits are held at a time (log_probs.py). Both ask this module. A plan of memory runs the pass on fake tensors
of the CPU, inside planned_device("cuda", ...), and gets what the GPU would do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# The device type and the bytes of memory that are planned for; None: what there is.
_planned: tuple[str, float] | None = None


@contextmanager
def planned_device(device_type: str, memory_bytes: float) -> Iterator[None]:
    """Make the passes inside choose as on a device of this type ("cuda", "cpu") with this much memory."""
    global _planned
    outer = _planned
    _planned = device_type, memory_bytes
    try:
        yield
    finally:
        _planned = outer


def device_type(device: torch.device) -> str:
    """Return the type of the device that a pass on `device` is for."""
    return _planned[0] if _planned else device.type


def gpu_bytes(device: torch.device) -> float | None:
    """Return how much memory the GPU has that a pass on `device` is for; None if it is not for a CUDA GPU."""
    if device_type(device) != "cuda":
        return None
    return _planned[1] if _planned else torch.cuda.get_device_properties(device).total_memory


def gpu_has_flash_attention(device: torch.device) -> bool:
    """Return whether a pass on `device` is for a GPU with torch's flash attention; every planned one has it.

    It needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later. On AMD GPUs, the log-sums that torch
    returns have had different shapes in different versions.
    """
    if device_type(device) != "cuda":
        return False
    return _planned is not None or (
        torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    )
