"""Two things that make training faster on CPUs: keeping freed memory, and packing weights for sampling."""

import ctypes
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from gspo import SPIN_COUNT_COMES_LATE

# Parameters of glibc's mallopt(), from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
# Bytes that the process asks of the system at a time.
GROWTH = 64 << 20


def prepare_cpu() -> None:
    """Prepare the process to train on a CPU, and warn if its threads will be slow. Can be called again."""
    keep_freed_memory()
    if SPIN_COUNT_COMES_LATE:
        warnings.warn(
            "torch was imported before the toolkit, so its threads spin for long while they wait, which is "
            "slow on a CPU that is busy: import data_loader or gspo_implementation first, or set "
            "GOMP_SPINCOUNT=10000",
            stacklevel=3,
        )


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the rest of the process. Other C libraries are left as they are.

    By default, glibc returns a large block to the system when it is freed. A moment later it requests a new
    one, which the system zeroes page by page. On a CPU, this takes a sixth of the time of a training step.
    Keeping the memory raises its peak by a tenth.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, GROWTH)


@contextmanager
def packed_weights(model: nn.Module, num_rows: int) -> Iterator[None]:
    """Make the model's linear layers use packed copies of their current weights. There are no gradients.

    Packing lays the weights out once in the order that oneDNN's bfloat16 products read them. It does nothing
    on a GPU, without autocast to bfloat16, or on a CPU for which oneDNN has no such products.

    Args:
        num_rows: about how many rows the inputs of most layers will have.
    """
    layers: list[nn.Linear] = []
    if _packing_helps(model):
        layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().bfloat16(), num_rows)
        bias = None if layer.bias is None else layer.bias.detach().bfloat16()
        layer.forward = partial(_packed_linear, weight, bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _packing_helps(model: nn.Module) -> bool:
    device = model.get_input_embeddings().weight.device.type
    if device != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    if torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _packed_linear(weight: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs.bfloat16(), weight, bias, "none", [], "")
