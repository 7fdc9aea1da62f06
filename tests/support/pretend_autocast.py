"""torch.autocast on the pretend GPU: the casts that it makes on CUDA."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch

# Operations by what CUDA's autocast casts their floating-point arguments to (torch's autocast_mode.h). These
# are the operations that a language model may use. All others take their arguments as they are.
COMPUTE_TYPE = (
    "linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "conv1d",
    "linalg_vecdot", "scaled_dot_product_attention",
)  # fmt: skip
FLOAT32 = (
    "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "pow.Tensor_Scalar",
    "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm", "rms_norm",
    "group_norm", "nll_loss", "kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "logsumexp", "prod",
    "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm", "sum",
    "sum.dim_IntList",
)  # fmt: skip
WIDEST = ("addcdiv", "addcmul", "atan2", "dot", "vdot", "index_put", "scatter_add", "tensordot")
# The key under which torch's dispatcher looks for autocast on the device, which is its "private use" device.
KEY = "AutocastPrivateUse1"


def map_arguments(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to each argument or result of an operation. Torch's tree_map takes thrice as long."""
    if isinstance(value, (list, tuple)):
        return type(value)([map_arguments(function, item) for item in value])
    if isinstance(value, dict):
        return {name: map_arguments(function, item) for name, item in value.items()}
    return function(value)


def register_autocast(device_name: str) -> list[torch.library.Library]:
    """Register the casts for torch's private-use device of this name; they stay while the result is kept."""
    others, library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, KEY)

    def castable(value: Any) -> bool:
        if not isinstance(value, torch.Tensor) or value.device.type != device_name:
            return False
        return value.is_floating_point() and value.dtype != torch.float64

    def register(name: str, choose: Callable[[list[torch.dtype]], torch.dtype]) -> None:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

        def with_casts(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(
                torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))
            ):
                types: list[torch.dtype] = []
                map_arguments(lambda x: types.append(x.dtype) if castable(x) else None, (args, kwargs))
                if not types or kwargs.get("dtype") is not None:
                    return operation(*args, **kwargs)
                chosen = choose(types)
                cast = partial(map_arguments, lambda x: x.to(chosen) if castable(x) else x)
                return operation(*cast(args), **cast(kwargs))

        library.impl(name, with_casts, KEY)

    for name in COMPUTE_TYPE:
        register(name, lambda types: torch.get_autocast_dtype(device_name))
    for name in FLOAT32:
        register(name, lambda types: torch.float32)
    for name in WIDEST:
        register(name, lambda types: reduce(torch.promote_types, types))
    return [others, library]
