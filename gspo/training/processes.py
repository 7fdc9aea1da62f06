"""The processes that train together. The main process, rank 0, has the record and the checkpoints."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from gspo.policy.sharded_model import Sharding
from gspo.policy.vllm_server import EngineError
from gspo.training.config import GSPOConfig
from gspo.training.hardware import Machine, machine_for, num_machines, processes_here
from gspo.training.whole_folders import CannotSave

# Hours that the processes wait for one of them, longer than a vLLM server may take to answer, or a model to
# be written. If one dies, the launcher ends the others.
PATIENCE_H = 2
# Minutes that a process waits in the middle of a computation, which all of them enter together.
COMPUTING_PATIENCE_MIN = 10.0
# Seconds that a process waits for gloo's threads at its end. They need microseconds, once they have a core.
LAST_TENSORS_S = 0.5
# accelerate's launcher sets these variables if it is to shard the model in one of these ways. The toolkit
# shards by itself.
LAUNCHER_SETTINGS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
# Errors that end a run with one line that says what to do. All processes raise the same one.
REFUSALS = (CannotSave, EngineError, ValueError, OSError)


def end_processes() -> None:
    """Leave the other processes at the end of a run; does nothing if there are none.

    A process that ends without it may be aborted (https://github.com/pytorch/pytorch/issues/190489): a thread
    of gloo's frees the tensors of the last exchange a little later, and needs the interpreter for it.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(LAST_TENSORS_S)


def refuse_idle_processes(config: GSPOConfig, count: int) -> None:
    """Raise a ValueError if a rollout batch has fewer queries than there are processes."""
    if config.batch_size < count:
        raise ValueError(
            f"--batch_size {config.batch_size}: a rollout batch has fewer queries than the {count} processes "
            f"that share them; give --batch_size {count}, and --mini_batch_size {count} or a part of it"
        )


class ProcessFailed(Exception):
    """Another process has failed with an error that is none of REFUSALS, and shows its traceback."""


class _Abandoned(Exception):
    """Ends a context whose body has failed."""


class Processes:
    """This process among those that torchrun or accelerate's launcher has started; alone without a launcher.

    The methods but alone() and contiguous_share() are collective: all processes call them, in the same order.

    Attributes:
        shared_error: the error that has ended work of theirs, if all processes raise one for it.

    Raises:
        ValueError: accelerate does not use the device ("cpu" or "cuda"), or was launched with settings that
            would be ignored.
    """

    def __init__(self, device: str):
        for variable, name in LAUNCHER_SETTINGS.items():
            if os.environ.get(variable, "false").lower() == "true":
                raise ValueError(
                    f"accelerate was launched with {name} ({variable}), which is not used here: launch "
                    "without it, and give --shard full to train_gspo.py"
                )
        patience = InitProcessGroupKwargs(timeout=timedelta(minutes=COMPUTING_PATIENCE_MIN))
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
        self.shared_error: Exception | None = None
        # Objects travel in a group of their own, on the CPU: in it, all wait for what one alone does.
        self._objects = None
        if self.count > 1:
            patience = timedelta(hours=PATIENCE_H)
            self._objects = distributed.new_group(backend="gloo", timeout=patience)

    def alone(self) -> "Processes":
        """The main process without the others, which may have failed: for its last work."""
        alone = copy(self)
        alone.count, alone.is_main = 1, True
        return alone

    def contiguous_share(self, count: int) -> range:
        """The part of range(count) that belongs to this process; the parts are in the order of the ranks."""
        share = np.array_split(np.arange(count), self.count)[self.rank].tolist()
        return range(share[0], share[-1] + 1) if share else range(0)

    def gather(self, items: Sequence) -> list:
        """The items of all processes, in the order of the ranks."""
        if self.count == 1:
            return list(items)
        parts: list[Any] = [None] * self.count
        distributed.all_gather_object(parts, list(items), self._objects)
        return [item for part in parts for item in part]

    def least_machine(self) -> Machine:
        """What a plan is made for: the GPU of the process that has the least memory, or its main memory."""
        machines = self.gather([machine_for(None, self.device.type)])
        least = min(machines, key=lambda machine: machine.total_bytes)
        if all(machine.total_bytes == least.total_bytes for machine in machines):
            return least
        return replace(least, name=f"the smallest of {self.count}, {least.name}")

    def any(self, flag: bool) -> bool:
        """True if the flag is set in at least one process."""
        return any(self.gather([flag]))

    def on_main(self, work: Callable, *arguments: Any) -> Any:
        """Do work(*arguments) on the main process, and return its result in all processes.

        If it fails, all of them raise an error as with each().
        """
        if self.count == 1:
            return work(*arguments)
        own = None
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work(*arguments)
            except Exception as error:
                own, outcome[1] = error, self._told(error)
        distributed.broadcast_object_list(outcome, 0, self._objects)
        result, told = outcome
        if told is not None:
            raise self._shared(own or told)
        return result

    @contextmanager
    def around_main(self, make: Callable[[], AbstractContextManager]) -> Iterator[Any]:
        """Be in the context make() on the main process, and yield its value in all processes.

        If the body ends with one of REFUSALS anywhere, the context does too, and it is raised in all of them.
        """
        with ExitStack() as stack:
            value = self.on_main(lambda: stack.enter_context(make()))
            errors = []
            try:
                yield value
            except REFUSALS as refusal:
                errors = [refusal]
            except BaseException:  # not of the context's own making: it cleans up and adds nothing
                with suppress(_Abandoned), stack:
                    raise _Abandoned from None
                raise
            errors = self.gather(errors)

            def leave() -> None:
                with stack:
                    if errors:
                        raise errors[0]

            self.on_main(leave)

    def each(self, work: Callable, *arguments: Any) -> Any:
        """Do work(*arguments), in which no process waits for another, and return its own result.

        If it fails anywhere, all processes raise an error: where it failed their own, elsewhere the first of
        these if it is one of REFUSALS, and otherwise a ProcessFailed.
        """
        if self.count == 1:
            return work(*arguments)
        result = own = None
        try:
            result = work(*arguments)
        except Exception as error:
            own = error
        told = self.gather([] if own is None else [self._told(own)])
        if not told:
            return result
        # One kind everywhere, since around_main() treats them differently.
        first = next((error for error in told if isinstance(error, ProcessFailed)), told[0])
        if own is not None and isinstance(own, REFUSALS) == isinstance(first, REFUSALS):
            raise self._shared(own)
        raise self._shared(first)

    def _told(self, error: Exception) -> Exception:
        """What other processes are told of an error of this one, which they might not be able to make."""
        for kind in REFUSALS:
            if isinstance(error, kind):
                return kind(str(error))
        return ProcessFailed(f"process {self.rank} failed: {type(error).__name__}: {error}")

    def _shared(self, error: Exception) -> Exception:
        self.shared_error = error
        return error

    def together(self, work: Callable, *arguments: Any) -> Any:
        """Do work(*arguments), in which processes wait for one another, and return its own result.

        If it ends with one of REFUSALS anywhere, the first of them is raised in all processes. Another error
        is raised where it happens, and the launcher ends the others.
        """
        if self.count == 1:
            return work(*arguments)
        result, errors = None, []
        try:
            result = work(*arguments)
        except REFUSALS as refusal:
            errors = [refusal]
        errors = self.gather(errors)
        if errors:
            raise self._shared(errors[0])
        return result

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes. One of a sharded weight is that already."""
        for parameter in parameters:
            if parameter.grad is None:  # no row of this process reached it
                parameter.grad = torch.zeros_like(parameter)
            if self.count > 1 and not isinstance(parameter, DTensor):
                distributed.all_reduce(parameter.grad)

    def sharding(self) -> Sharding | None:
        """All processes, with a copy of the model on each machine. None: there is one process.

        Raises:
            ValueError: the machines have different numbers of processes.
        """
        if self.count == 1:
            return None
        if len(set(self.gather([processes_here()]))) > 1:
            raise ValueError("--shard full: start as many processes on each machine (--nproc_per_node)")
        copies = num_machines()
        shape = (copies, self.count // copies) if copies > 1 else (self.count,)
        names = ("copies", "shards")[-len(shape) :]
        return Sharding(init_device_mesh(self.device.type, shape, mesh_dim_names=names), self._objects)
