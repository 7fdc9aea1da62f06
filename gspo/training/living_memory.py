"""Count the bytes of the tensors that are alive, by what they are for, and at their peak.

Under FakeTensorMode a tensor has a shape and no memory, so the update of a model of any size can be counted
in seconds, on any machine. Real tensors are counted in the same way.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Peak:
    """The moment at which the most bytes were alive.

    Attributes:
        number: storages made up to then.
        parts: bytes by part.
    """

    num_bytes: int = -1
    number: int = 0
    parts: Counter[str] = field(default_factory=Counter)


class LivingMemory(TorchDispatchMode):
    """Counts the storages that operations make while it is entered.

    Attributes:
        peaks: one for each section of the work, in order; start_section() ends a section and starts one.
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        """vocabulary: tensors whose last dimension has this size are counted as "logits"."""
        super().__init__()
        self.vocabulary = vocabulary
        self.peaks = [Peak()]
        self._alive: Counter[str] = Counter()  # bytes by part
        self._part = "other"
        self._storages: dict[int, tuple[str, int, int]] = {}  # by address: part, bytes, number
        self._number = 0  # of storages so far
        self._now = 0  # bytes alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Most operations return a tensor, and looking for tensors in anything is slow.
        for value in [result] if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._count(value)
        return result

    @contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """Count what is made inside as this part."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def forget_peaks(self) -> None:
        """Forget the sections so far. The one that starts now is the first."""
        self.peaks = []
        self.start_section()

    def start_section(self) -> None:
        self.peaks.append(Peak())
        self._note_peak()

    def parts(self, **tensors: Sequence[torch.Tensor]) -> list[dict[str, float]]:
        """Bytes by part at the peak of each section.

        The given tensors, which are alive still, are parts of their own.
        """
        sections = []
        for peak in self.peaks:
            parts = Counter(peak.parts)
            for name, given in tensors.items():
                addresses = {tensor.untyped_storage()._cdata for tensor in given}
                for part, num_bytes, number in (self._storages[address] for address in addresses):
                    if number <= peak.number:  # made before the peak
                        parts[part] -= num_bytes
                        parts[name] += num_bytes
            sections.append({part: float(num_bytes) for part, num_bytes in parts.items() if num_bytes})
        return sections

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return
        self._number += 1
        num_bytes = storage.nbytes()
        part = self._part
        if part == "activations" and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
            part = "logits"
        self._storages[address] = part, num_bytes, self._number
        self._alive[part] += num_bytes
        self._now += num_bytes
        weakref.finalize(storage, self._forget, address)
        if self._now > self.peaks[-1].num_bytes:
            self._note_peak()

    def _note_peak(self) -> None:
        self.peaks[-1] = Peak(self._now, self._number, self._alive.copy())

    def _forget(self, address: int) -> None:
        part, num_bytes, _ = self._storages.pop(address)
        self._alive[part] -= num_bytes
        self._now -= num_bytes
