"""AdamW over bfloat16 weights, with both moments in 8 bits: 6 bytes a parameter instead of AdamW's 16.

Every value is rounded stochastically: up with the probability that makes the rounding right on average.
Rounding to the nearest would lose what GSPO learns. An update of 1e-6 is smaller than half a step of most
bfloat16 weights, and a change of 0.1 % in the second moment is smaller than half a step of any 8-bit code.

A moment is stored in blocks of BLOCK values. Each block has a scale, a power of two above all of its values,
and each value divided by it has a floating-point code of 8 bits:

    first moment    sign, 4 bits of exponent, 3 bits of fraction       down to 2^-16 of the scale, then 0
    second moment   5 bits of exponent, 3 bits of fraction             down to 2^-32 of the scale, never below

The second moment never rounds to 0, where its square root divides. The scales are powers of two so that a
block whose largest value changes does not round all others anew.

Gradients are in bfloat16, too, and passes of an update add to them with rounding to the nearest: many short
passes are a little less exact than few long ones. The update itself is computed in float32, on chunks of a
tensor. Everything is plain tensor operations, which need no compiler and run on any device. The random
numbers depend on the seed and on the number of the step alone, so that a resumed run and every process of a
run round alike.
"""

from collections.abc import Callable, Iterable
from functools import partial
from random import Random
from typing import Any

import torch
from torch.distributed.tensor import DTensor, zeros
from torch.nn import functional as F

from gspo.policy.sharded_model import copy_whole, first_row, local_part, whole_tensor

BLOCK = 256
# Values updated at a time, a multiple of BLOCK. Their temporary tensors take about 50 bytes a value.
CHUNK = 1 << 22
# A float32 has 23 bits of fraction. A code keeps 3 of them, a bfloat16 7.
CODE_DROPS, BFLOAT16_DROPS = 20, 16
# The exponent and fraction of 1.0, as 11 bits. The highest code stands for 1.0, a value equal to the scale.
ONE = 127 << 3
FIRST_MOMENT_ZERO, SECOND_MOMENT_LOWEST = ONE - 127, ONE - 255
# Of one parameter: codes (blocks, BLOCK), the last block padded, and scales (blocks, 1) of the two moments.
# If each row has whole blocks, they are (rows, blocks of a row, ...), which can be sharded as the rows are.
MOMENT_TENSORS = ("codes_1", "scales_1", "codes_2", "scales_2")
SMALLEST_SCALE = 2.0**-126  # below it, float32 loses precision
MAGNITUDE, EXPONENT = 0x7FFFFFFF, 0x7F800000  # bits of a float32


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, for parameters in bfloat16.

    Args:
        lr: a number, or a tensor of one.
        seed: of the rounding.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float | torch.Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # The state of the rounding stands in the group, which state_dict() saves.
        super().__init__(params, defaults | {"seed": seed, "steps": 0})
        self._forget()

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["steps"] += 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            assert all(parameter.dtype == torch.bfloat16 for parameter in parameters)
            random = Random((group["seed"] << 64) + group["steps"])
            longest = max((parameter.numel() for parameter in parameters), default=0)
            noise = _draw_noise(random, min(longest, CHUNK))
            for parameter in parameters:
                noise = noise.to(parameter.device)
                self._update(parameter, group, random, noise)
        return loss

    def _update(
        self, parameter: torch.nn.Parameter, group: dict, random: Random, noise: torch.Tensor
    ) -> None:
        state = self.state[parameter]
        state["step"] += 1
        in_parts = not _has_whole_moments(parameter)
        part_of = local_part if in_parts else whole_tensor
        weights, gradients = part_of(parameter).view(-1), part_of(parameter.grad).reshape(-1)
        moments = {name: local_part(state[name]).flatten(0, -2) for name in MOMENT_TENSORS}
        # The place of these weights among all of the parameter.
        first = first_row(parameter) * parameter.shape[1:].numel() if in_parts else 0
        last = first + len(weights)
        for start in range(0, parameter.numel(), CHUNK):
            # All chunks share the noise. With keys of its own, a chunk's noise is independent of any other's.
            keys = [random.getrandbits(CODE_DROPS) for _ in noise]
            low, high = max(start, first), min(start + CHUNK, last)
            if low >= high:  # in another process's part
                continue
            blocks = slice((low - first) // BLOCK, -(-(high - first) // BLOCK))
            parts = {name: moment[blocks] for name, moment in moments.items()}
            place = (low - start) // BLOCK
            own_noise = [
                part[place : place + len(parts["codes_1"])] ^ key
                for part, key in zip(noise, keys, strict=True)
            ]
            own = slice(low - first, high - first)
            _update_chunk(weights[own], gradients[own], parts, own_noise, group, state["step"])
        if isinstance(parameter, DTensor) and not in_parts:
            copy_whole(parameter, weights.view(parameter.shape))

    def _forget(self) -> None:
        """Set all moments to 0."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = _new_state(parameter)

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up the state of state_dict(), bit for bit; parameters without one have moments of 0."""
        # torch would convert the codes and scales to the type of the weights.
        super().load_state_dict(state_dict | {"state": {}})
        self._forget()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, saved in state_dict["state"].items():
            state = self.state[parameters[index]]
            for name, value in saved.items():
                if isinstance(value, DTensor):
                    state[name].copy_(value)
                elif isinstance(value, torch.Tensor):
                    copy_whole(state[name], value.view(state[name].shape))
                else:
                    state[name] = value


def _new_state(parameter: torch.Tensor) -> dict[str, Any]:
    """The state before the first step: moments of 0."""
    blocks: tuple[int, ...] = (-(-parameter.numel() // BLOCK),)
    if rows_are_blocks(parameter):
        blocks = (len(parameter), blocks[0] // len(parameter))
    make: Callable[..., torch.Tensor] = partial(torch.zeros, device=parameter.device)
    if isinstance(parameter, DTensor) and not _has_whole_moments(parameter):
        make = partial(zeros, device_mesh=parameter.device_mesh, placements=parameter.placements)
    return {
        "step": 0,
        "codes_1": make((*blocks, BLOCK), dtype=torch.int8),
        "scales_1": make((*blocks, 1), dtype=torch.float32),
        "codes_2": make((*blocks, BLOCK), dtype=torch.uint8),
        "scales_2": make((*blocks, 1), dtype=torch.float32),
    }


def rows_are_blocks(parameter: torch.Tensor) -> bool:
    """True if each row has whole blocks, so that the rows can be dealt to processes."""
    return parameter.shape[1:].numel() % BLOCK == 0


def _has_whole_moments(parameter: torch.Tensor) -> bool:
    """True if this process has all moments of the parameter and makes all of its update.

    That is so without shards. It is also so for sharded parameters whose blocks reach across rows: those of
    norms, and of a model whose width is no multiple of BLOCK nearly all. For these, every process makes the
    same update, and keeps its part of the weights.
    """
    return not (isinstance(parameter, DTensor) and rows_are_blocks(parameter))


def _draw_noise(random: Random, count: int) -> torch.Tensor:
    """Uniform integers below 2^CODE_DROPS, (3, blocks, BLOCK): for the weights and the two moments."""
    # On the CPU, so that the numbers are the same on every device.
    generator = torch.Generator().manual_seed(random.getrandbits(63))
    shape = (3, -(-count // BLOCK), BLOCK)
    return torch.randint(1 << CODE_DROPS, shape, dtype=torch.int32, generator=generator)


def _update_chunk(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    state: dict[str, torch.Tensor],
    noise: list[torch.Tensor],
    group: dict,
    step: int,
) -> None:
    """AdamW's update of weights (n,) in place, and of the tensors of their moments.

    noise: three tensors (blocks, BLOCK) of _draw_noise().
    """
    beta1, beta2 = group["betas"]
    count = len(weights)
    gradients = F.pad(gradients.float(), (0, -count % BLOCK)).view(-1, BLOCK)
    first = decode_first(state["codes_1"], state["scales_1"]).lerp_(gradients, 1 - beta1)
    second = decode_second(state["codes_2"], state["scales_2"])
    second.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    new_state = *encode_first(first, noise[1]), *encode_second(second, noise[2])
    for name, values in zip(MOMENT_TENSORS, new_state, strict=True):
        state[name].copy_(values)
    denominator = second.div_(1 - beta2**step).sqrt_().add_(group["eps"])
    update = first.div_(1 - beta1**step).div_(denominator).view(-1)[:count]
    updated = weights.float().mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.mul_(group["lr"]))
    weights.copy_(round_to_bfloat16(updated, noise[0].view(-1)[:count]))


def round_to_bfloat16(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Round float32 values to bfloat16; noise: uniform integers, of which the lowest 16 bits are used.

    The dropped bits are the probability of rounding away from 0: adding noise to them carries that often.
    """
    lowest = (1 << BFLOAT16_DROPS) - 1
    bits = values.view(torch.int32) + (noise & lowest)
    return (bits & ~lowest).view(torch.float32).bfloat16()


def encode_first(values: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 and scales float32 (blocks, 1) of values (blocks, BLOCK); noise: integers below 2^20."""
    bits, scales = _scaled_bits(values)
    magnitude = (((bits & MAGNITUDE) + noise) >> CODE_DROPS).sub_(FIRST_MOMENT_ZERO).clamp_(0, 127)
    sign = bits >> 31  # -1 or 0
    return magnitude.bitwise_xor_(sign).sub_(sign).to(torch.int8), scales  # ~x + 1 is -x


def decode_first(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values of encode_first()."""
    magnitude = ((codes.abs().int() + FIRST_MOMENT_ZERO) << CODE_DROPS).view(torch.float32)
    return magnitude.mul_(codes.sign()).mul_(scales)  # the sign of code 0 is 0


def encode_second(values: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 and scales float32 (blocks, 1) of values (blocks, BLOCK) that are not negative."""
    bits, scales = _scaled_bits(values)
    codes = ((bits + noise) >> CODE_DROPS).sub_(SECOND_MOMENT_LOWEST).clamp_(0, 255)
    return codes.to(torch.uint8), scales


def decode_second(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values of encode_second()."""
    return ((codes.int() + SECOND_MOMENT_LOWEST) << CODE_DROPS).view(torch.float32).mul_(scales)


def _scaled_bits(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of values / scale, and the scales (blocks, 1); scale 0 for a block of zeros."""
    largest = values.abs().amax(1, keepdim=True)
    scales = (largest.view(torch.int32) & EXPONENT).view(torch.float32) * 2  # the power of two above
    return (values / scales.clamp(min=SMALLEST_SCALE)).view(torch.int32), scales
