"""Counts how often the CPU would wait for a GPU, on the pretend GPU.

with pretend_gpu(), count_synchronisations() as counted:
    t.train_step(TRAIN)
assert not counted.reads, counted.reads           # the places, most frequent first
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from support import ROOT
from support.pretend_gpu import COPIES, INDEXING, DeviceTensor, is_on_device, observers

# A place is a line in one of these.
TOOLKIT = (str(ROOT / "gspo"), str(ROOT / "gspo_implementation.py"))
# Operations that wait for a value or, as their result has a shape that depends on values, for that shape.
READING = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
}  # fmt: skip


@dataclass
class Synchronisations:
    """How often the CPU would have waited, by place, such as "gspo/policy/rollout.py:179 _sample_batch".

    A place is the innermost line of the toolkit that led to it, or "elsewhere" if there is none.

    Attributes:
        reads: values that came to the CPU (.item(), .tolist(), .cpu(), an `if`), and results whose shape
            depends on values (nonzero(), unique(), indexing with a mask).
        uploads: CPU tensors that went to the device without non_blocking=True, and are not empty.
    """

    reads: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)

    def note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Count an operation of torch, with the arguments that it is about to be called with."""
        name = func.name()
        source: Any = args[1] if name == "aten::copy_" else next(iter(args), None)
        if name in COPIES:
            from_device = isinstance(source, DeviceTensor)
            to_device = isinstance(args[0], DeviceTensor)  # copy_(target, source), or _to_copy(source)
            if kwargs.get("device") is not None:
                to_device = is_on_device(kwargs["device"])
            if from_device and not to_device:
                self.reads[_place()] += 1
            elif to_device and not from_device and source.numel() and not kwargs.get("non_blocking"):
                self.uploads[_place()] += 1
        elif not isinstance(source, DeviceTensor):
            return
        elif name in READING:
            self.reads[_place()] += 1
        elif name == "aten::repeat_interleave.Tensor" and kwargs.get("output_size") is None:
            self.reads[_place()] += 1
        elif name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.reads[_place()] += 1
            if not all(isinstance(index, DeviceTensor) for index in indices):
                self.uploads[_place()] += 1


@contextmanager
def count_synchronisations() -> Iterator[Synchronisations]:
    """Count what happens on the pretend GPU inside. Counters can be nested."""
    counted = Synchronisations()
    note = counted.note
    observers.append(note)
    try:
        yield counted
    finally:
        observers.remove(note)


def _place() -> str:
    frame: Any = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(TOOLKIT):
            return f"{path.removeprefix(f'{ROOT}/')}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
