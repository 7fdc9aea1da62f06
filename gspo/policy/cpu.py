"""What only CPUs need to be fast: freed memory that is kept, and weights laid out once for sampling."""

import ctypes
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

# glibc's mallopt() parameters, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
GROWTH = 64 << 20  # bytes asked of the system at a time


def keep_freed_memory() -> None:
    """For the rest of the process; other C libraries than glibc are left as they are.

    glibc gives a large block back when it is freed, and asks for it anew, zeroed page by page, a moment
    later: a sixth of the time of a training step on a CPU, for a tenth more memory at the peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, GROWTH)


@contextmanager
def packed_weights(model: nn.Module, num_rows: int):
    """Within it, the model's linear layers use packed copies of their weights as they are now; no gradients.

    Elsewhere (a GPU, no autocast to bfloat16, a CPU without such products in oneDNN) they stay as they are.

    Args:
        num_rows: about how many rows most products will have.
    """
    device = model.get_input_embeddings().weight.device.type
    bfloat16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    packs = device == "cpu" and bfloat16 and _can_pack()
    layers = [module for module in model.modules() if type(module) is nn.Linear] if packs else []
    for layer in layers:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().bfloat16(), num_rows)
        bias = None if layer.bias is None else layer.bias.detach().bfloat16()
        layer.forward = partial(_linear, weight, bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _can_pack() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _linear(weight, bias, inputs: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs.bfloat16(), weight, bias, "none", [], "")
