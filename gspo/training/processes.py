"""The processes that train together. The main process, rank 0, has the record and the checkpoints."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from gspo.policy.vllm_server import EngineError
from gspo.training.whole_folders import CannotSave

# Hours that the processes wait for one of them, longer than a vLLM server may take to answer. If one dies,
# the launcher ends the others.
PATIENCE_H = 2
# Errors that end a run with one line that says what to do. All processes raise the same one.
REFUSALS = (ValueError, CannotSave, OSError, EngineError)


class Processes:
    """This process among those that torchrun or accelerate's launcher has started; alone without a launcher.

    The methods but contiguous_share() are collective: all processes call them, in the same order.

    Raises:
        ValueError: accelerate does not use the device ("cpu" or "cuda").
    """

    def __init__(self, device: str):
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=PATIENCE_H))
        self._accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[patience])
        self.device: torch.device = self._accelerator.device
        # Left to itself, accelerate takes whatever accelerator it finds, such as an Apple GPU.
        if self.device.type != device:
            raise ValueError(
                f"accelerate has chosen the device {self.device}, but the run was to use {device}: unset "
                "ACCELERATE_TORCH_DEVICE, and give --device"
            )
        self.rank: int = self._accelerator.process_index
        self.count: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process

    def contiguous_share(self, count: int) -> range:
        """The part of range(count) that belongs to this process; the parts are in the order of the ranks."""
        share = np.array_split(np.arange(count), self.count)[self.rank].tolist()
        return range(share[0], share[-1] + 1) if share else range(0)

    def gather(self, items: Sequence) -> list:
        """The items of all processes, in the order of the ranks."""
        return gather_object(list(items))

    def any(self, flag: bool) -> bool:
        """True if the flag is set in at least one process."""
        return any(self.gather([flag]))

    def on_main(self, work: Callable, *arguments: Any) -> Any:
        """Do work(*arguments) on the main process, and return its result in all processes.

        One of REFUSALS is raised in all of them, another exception on the main one alone.
        """
        result = error = None
        if self.is_main:
            try:
                result = work(*arguments)
            except REFUSALS as refusal:
                error = refusal
        result, error = broadcast_object_list([result, error])
        if error is not None:
            raise error
        return result

    def together(self, work: Callable, *arguments: Any) -> Any:
        """Do work(*arguments) in each process, and return its own result.

        If it ends with one of REFUSALS anywhere, the first of them is raised in all processes.
        """
        result, errors = None, []
        try:
            result = work(*arguments)
        except REFUSALS as refusal:
            errors = [refusal]
        errors = self.gather(errors)
        if errors:
            raise errors[0]
        return result

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes."""
        for parameter in parameters:
            if parameter.grad is None:  # no row of this process reached it
                parameter.grad = torch.zeros_like(parameter)
            if self.count > 1:  # accelerate copies the gradient even if there is one process
                parameter.grad = self._accelerator.reduce(parameter.grad, reduction="sum")
