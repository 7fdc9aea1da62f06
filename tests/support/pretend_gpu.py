"""A pretend GPU: CPU tensors under another device name, for tests of GPU code on machines without a GPU.

    with pretend_gpu() as device:
        trainer("tiny", device="cuda").train(TRAIN, EVAL)         # GSPOTrainer trains on the pretend GPU
        torch.zeros(3, device=device) + torch.zeros(3)            # RuntimeError, as on CUDA

    with count_synchronisations() as counted:
        ...
    counted.reads, counted.uploads                                # how often the CPU would wait, by place

A tensor on the device is a wrapper around a CPU tensor. Every operation reaches _run(), which checks the
devices, unwraps the arguments, computes on the CPU and wraps the results.

What agrees with CUDA: an operation on tensors of both devices is an error, except for those that CUDA allows
(_check_devices has the list); .numpy() and .pin_memory() are errors; autocast casts what CUDA's autocast
casts. What does not: speed, memory, kernels and their rounding, and that torch.load without map_location
returns CPU tensors.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import gspo_implementation
from gspo.training.processes import Processes
from support import ROOT

NAME = "pretend"

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
        if func in (torch.tensor, torch.as_tensor) and _is_on_device(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


def _is_on_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Do one operation of torch. Raises RuntimeError where CUDA would, for tensors on different devices."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    uses_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
    if uses_device:
        _check_devices(func, args, tensors)
    name = func.name()
    device = kwargs.get("device")
    to_device = uses_device if device is None else _is_on_device(device)
    for counted in _counters:
        counted.note(func, args, kwargs, uses_device, to_device)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    unwrapped = {id(_host(tensor)): tensor for tensor in tensors}
    args, kwargs = tree_map(_host, args), tree_map(_host, kwargs)
    compute = _integer_histc if name == "aten::histc" and uses_device else func
    results = compute(*args, **kwargs)
    for host, tensor in zip(map(_host, tensors), tensors, strict=True):
        assert host.shape == tensor.shape, f"{name} changes the shape of a tensor in place"

    def wrap(result: Any) -> Any:
        if id(result) in unwrapped:  # an operation in place returns its argument
            return unwrapped[id(result)]
        return DeviceTensor(result) if to_device and isinstance(result, torch.Tensor) else result

    return tree_map(wrap, results)


def _host(value: Any) -> Any:
    return value.host if isinstance(value, DeviceTensor) else value


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


# --------------------------------------------------------------------------------------------------- autocast

# Operations by what CUDA's autocast does to them, from torch's autocast_mode.h: those that a language model
# may use. The others compute in the types that they are given.
LOWER_PRECISION = (
    "linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "conv1d",
    "linalg_vecdot", "scaled_dot_product_attention",
)  # fmt: skip
FLOAT32 = (
    "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "pow.Tensor_Scalar",
    "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm", "rms_norm", "group_norm",
    "nll_loss", "kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "logsumexp", "prod", "prod.dim_int",
    "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm", "sum", "sum.dim_IntList",
)  # fmt: skip
WIDEST = ("addcdiv", "addcmul", "atan2", "dot", "vdot", "index_put", "scatter_add", "tensordot")


def _register_autocast(library: torch.library.Library, name: str, choose: Callable[..., torch.dtype]) -> None:
    """Give an operation of aten the cast that torch.autocast makes on the device.

    choose: the types of the arguments to the type that floating-point arguments are cast to.
    """
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            floats = [leaf for leaf in tree_leaves((args, kwargs)) if _is_castable(leaf)]
            if not floats or kwargs.get("dtype") is not None:
                return operation(*args, **kwargs)
            dtype = choose([tensor.dtype for tensor in floats])
            cast = functools.partial(tree_map, lambda x: x.to(dtype) if _is_castable(x) else x)
            return operation(*cast(args), **cast(kwargs))

    library.impl(name, autocast, "AutocastPrivateUse1")


def _is_castable(value: Any) -> bool:
    is_on_device = isinstance(value, torch.Tensor) and value.device.type == NAME
    return is_on_device and value.is_floating_point() and value.dtype != torch.float64


class _Backend(_DummyBackendModule):
    """What torch asks of a device's module, torch.pretend."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache
def _register() -> tuple[torch.library.Library, ...]:
    """Register the device with torch, once per process: it stays as long as the result is kept."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    others, library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # all but those that follow
    for name in LOWER_PRECISION:
        _register_autocast(library, name, lambda _: torch.get_autocast_dtype(NAME))
    for name in FLOAT32:
        _register_autocast(library, name, lambda _: torch.float32)
    for name in WIDEST:
        _register_autocast(library, name, lambda dtypes: functools.reduce(torch.promote_types, dtypes))
    return others, library


# ------------------------------------------------------------------------------------------------ its use


class _PretendProcesses(Processes):
    """One process, for which the device cuda is the pretend GPU."""

    def __init__(self, device: str):
        super().__init__("cpu")
        self.device = torch.device(NAME, 0) if device == "cuda" else self.device


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
        stack.enter_context(
            patch.object(gspo_implementation, "choose_device", lambda device: device or "cuda")
        )
        stack.enter_context(patch.object(gspo_implementation, "Processes", _PretendProcesses))
        # Otherwise torch's backward would want a thread for the device, which it starts for the devices that
        # are registered before the first backward of the process.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_Operations())
        stack.enter_context(_Functions())
        yield torch.device(NAME, 0)


# ----------------------------------------------------------------------------------------- synchronisations

# Operations whose results have a shape that depends on the values, for which the CPU has to wait.
SHAPED_BY_VALUES = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount",
}  # fmt: skip


@dataclass
class Synchronisations:
    """Where the CPU would have waited for a GPU, by place: "gspo/policy/rollout.py:196 _sample_batch".

    A place is the innermost line of the toolkit; without one, as in torch's backward, it is "elsewhere".

    Attributes:
        reads: values copied to the CPU (.item(), .tolist(), .cpu(), bool()), and results whose shape depends
            on values (nonzero(), unique(), indexing with a mask).
        uploads: CPU tensors copied to the device without non_blocking=True. From memory that is not pinned
            they wait, too.
    """

    reads: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)

    def note(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], uses_device: bool, to_device: bool
    ) -> None:
        """Count one operation. to_device: its results are on the device."""
        name = func.name()
        copies = name in COPIES
        if copies and name != "aten::_to_copy":
            to_device = isinstance(args[0], DeviceTensor)
            source_on_device = isinstance(args[1], DeviceTensor)
        else:
            source_on_device = uses_device
        if copies and to_device and not source_on_device and not kwargs.get("non_blocking"):
            self.uploads[_place()] += 1
        if not uses_device:
            return
        if name == "aten::_local_scalar_dense" or name == "aten::equal" or name in SHAPED_BY_VALUES:
            self.reads[_place()] += 1
        elif copies and source_on_device and not to_device:
            self.reads[_place()] += 1
        elif name == "aten::repeat_interleave.Tensor" and kwargs.get("output_size") is None:
            self.reads[_place()] += 1
        elif name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.reads[_place()] += 1
            if not all(isinstance(index, DeviceTensor) for index in indices):
                self.uploads[_place()] += 1


_counters: list[Synchronisations] = []


@contextmanager
def count_synchronisations() -> Iterator[Synchronisations]:
    """Count what the CPU would wait for inside, on the pretend GPU. Counters can be nested."""
    counted = Synchronisations()
    _counters.append(counted)
    try:
        yield counted
    finally:
        _counters.remove(counted)


def _place() -> str:
    frame = sys._getframe()
    toolkit = (str(ROOT / "gspo"), str(ROOT / "gspo_implementation.py"))
    while frame is not None:
        if frame.f_code.co_filename.startswith(toolkit):
            path = frame.f_code.co_filename.removeprefix(f"{ROOT}/")
            return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
