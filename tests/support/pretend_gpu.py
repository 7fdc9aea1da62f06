"""A pretend GPU: CPU tensors under another device name, for tests of GPU code on machines without a GPU.

    with pretend_gpu() as device:
        trainer("tiny", device="cuda").train_step(TRAIN)          # GSPOTrainer trains on the pretend GPU
        torch.zeros(3, device=device) + torch.zeros(3)            # RuntimeError, as on CUDA

A tensor on the device is a wrapper around a CPU tensor. Every operation reaches _run(), which checks the
devices, unwraps the arguments, computes on the CPU and wraps the results.

As on CUDA, an operation on tensors of both devices is an error, except for those in _check_devices();
.numpy() and .pin_memory() are errors; and autocast casts what CUDA's autocast casts. Other things are not as
on CUDA: speed, memory, kernels and their rounding, and torch.load without map_location, which returns CPU
tensors. synchronisations.py counts how often the CPU would wait for the device.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import gspo_implementation
from gspo.training.processes import Processes
from support.pretend_autocast import map_arguments, register_autocast

NAME = "pretend"
# Called with every operation, its arguments and its keyword arguments, before it is done.
observers: list[Callable[[Any, Sequence[Any], dict[str, Any]], None]] = []

# ------------------------------------------------------------------------------------------------ the tensors


class DeviceTensor(torch.Tensor):
    """A tensor on the pretend GPU. `host` is the CPU tensor that holds its values."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "DeviceTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.host})"

    def tolist(self) -> list:
        """Return the values as lists; torch itself does this for no subclass of its tensors."""
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> torch.Tensor:
        """Return new values, on the device unless another one is named."""
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **kwargs})

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as an array, if it is forced to copy them. Raises TypeError otherwise."""
        if not force:
            raise TypeError(f"cannot convert a tensor on {NAME} to numpy: copy it with .cpu() first")
        return self.detach().cpu().numpy()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage of the values, by which transformers sees which weights are tied."""
        return self.host.untyped_storage()

    def __deepcopy__(self, memo: dict) -> "DeviceTensor":
        if id(self) not in memo:
            copy = DeviceTensor(self.host.detach().clone()).requires_grad_(self.requires_grad)
            copy.__dict__.update(deepcopy({k: v for k, v in vars(self).items() if k != "host"}, memo))
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a CPU tensor, which is what torch.load(map_location="cpu") makes of a CUDA tensor."""
        return self.host.__reduce_ex__(protocol)


class _Operations(TorchDispatchMode):
    """Shows _run() the operations without an argument on the device, such as torch.zeros(3, device=...)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Makes torch.tensor(..., device=...) two operations, since it hides the second from dispatch modes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_on_device(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


def is_on_device(device: Any) -> bool:
    """Return whether this device, a string or a torch.device, is the pretend GPU; None is not."""
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Do one operation of torch. Raises RuntimeError where CUDA would, for tensors on different devices."""
    tensors: list[torch.Tensor] = []

    def host_of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        return value.host if isinstance(value, DeviceTensor) else value

    host_args, host_kwargs = map_arguments(host_of, args), map_arguments(host_of, kwargs)
    uses_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
    if uses_device:
        _check_devices(func, args, tensors)
    to_device = uses_device
    if kwargs.get("device") is not None:
        to_device = is_on_device(kwargs["device"])
        host_kwargs["device"] = torch.device("cpu")
    for observer in observers:
        observer(func, args, kwargs)
    compute = _integer_histc if uses_device and func.name() == "aten::histc" else func
    results = compute(*host_args, **host_kwargs)

    arguments = {id(host_of(tensor)): tensor for tensor in tuple(tensors)}

    def wrap(result: Any) -> Any:
        if id(result) in arguments:  # an operation in place returns its argument
            argument = arguments[id(result)]
            assert argument.shape == result.shape, f"{func.name()} changes a shape in place: not supported"
            return argument
        return DeviceTensor(result) if to_device and isinstance(result, torch.Tensor) else result

    return map_arguments(wrap, results)


def _integer_histc(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Do torch.histc for integers too, as CUDA does; the CPU's has none."""
    return torch.histc(values.double(), *args, **kwargs).to(values.dtype)


# What may have CPU tensors of any shape beside tensors on the device.
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
# Indexing with index tensors. Those may be on the CPU whatever they index.
INDEXING = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


def _check_devices(func: Any, args: Sequence[Any], tensors: Sequence[torch.Tensor]) -> None:
    """Raise RuntimeError if CUDA would not take the devices of these tensors, at least one on the device.

    CUDA takes copies between devices; CPU tensors as indices of a CUDA tensor; and in pointwise operations,
    a CPU tensor without dimensions that is not written to.
    """
    name = func.name()
    if name == "aten::_pin_memory":
        raise RuntimeError(f"cannot pin a tensor on {NAME}: only CPU tensors can be pinned")
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    if not on_cpu or name in COPIES:
        return
    if name in INDEXING:
        if not isinstance(args[0], DeviceTensor):
            raise RuntimeError(f"{name}: a CPU tensor cannot be indexed with tensors on {NAME}")
        on_cpu = [value for value in args[2:3] if not isinstance(value, DeviceTensor)]
    written = [a for a in args[:1] if func._schema.is_mutable and not isinstance(a, DeviceTensor)]
    scalars = [tensor for tensor in on_cpu if tensor.dim() == 0]
    takes_scalars = torch.Tag.pointwise in func.tags or name in {*INDEXING, *TAKES_SCALARS}
    if len(scalars) < len(on_cpu) or (scalars and not takes_scalars) or written:
        shapes = [(tuple(tensor.shape), tensor.device.type) for tensor in tensors]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {shapes}")


# Operations that are not marked as pointwise and still take a CPU tensor without dimensions.
TAKES_SCALARS = {
    "aten::where.self", "aten::masked_fill.Tensor", "aten::masked_fill_.Tensor", "aten::fill_.Tensor",
    "aten::fill.Tensor", "aten::index_fill.int_Tensor", "aten::index_fill_.int_Tensor",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- its use


class _Backend(_DummyBackendModule):
    """What torch asks of a device's module, torch.pretend."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache
def _register() -> list[torch.library.Library]:
    """Register the device with torch, once per process: it stays as long as the result is kept."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    return register_autocast(NAME)


class _PretendProcesses(Processes):
    """One process, for which the device cuda is the pretend GPU."""

    def __init__(self, device: str):
        super().__init__("cpu")
        self.device = torch.device(NAME, 0) if device == "cuda" else torch.device("cpu")


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """Add the pretend GPU to torch, and let a GSPOTrainer with device="cuda" (or None) train on it.

    Yields:
        The device. Its tensors live on outside, but new ones can be made inside only.
    """
    _register()
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swapping)
        # Otherwise, module.to() would replace every parameter by a new one, and untie tied weights.
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.enter_context(patch("gspo.training.decide.choose_device", lambda device: device or "cuda"))
        stack.enter_context(patch.object(gspo_implementation, "Processes", _PretendProcesses))
        # Everything fits.
        stack.enter_context(patch.object(gspo_implementation, "fit_to_gpu", lambda config, *_: config))
        # Otherwise torch's backward would want a thread for the device, which it starts for the devices that
        # are registered before the first backward of the process.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_Operations())
        stack.enter_context(_Functions())
        yield torch.device(NAME, 0)
