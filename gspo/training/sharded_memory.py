"""The memory of a process with sharded weights, from what all of them take in one process.

Weights, gradients and moments are divided by the shards. What a forward or backward pass keeps for its rows
is the same. Besides, weights are gathered in the compute type: those outside of the layers, and those of a
layer and of the next one, which is gathered ahead. Their gradients are whole until they are summed, which
takes a copy in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from gspo.policy.sharded_model import layers_of
from gspo.training.adamw_8bit import rows_are_blocks
from gspo.training.config import GSPOConfig

GATHERED = "gathered weights"
DIVIDED = ("weights", "gradients", "starting model")


@dataclass(frozen=True)
class UnitSizes:
    """Parameters of a model: all of them, those outside of its layers, and those of a layer on average.

    divisible: the share of all whose 8-bit moments are divided, too (adamw_8bit.rows_are_blocks).
    """

    total: int
    outside: int
    layer: float
    divisible: float

    @classmethod
    def of(cls, model_config: PreTrainedConfig, trust_remote_code: bool = False) -> "UnitSizes":
        """Count them without memory, of each model once per process."""
        key = model_config.to_json_string(use_diff=False)
        if key not in _COUNTED:
            _COUNTED[key] = cls._count(model_config, trust_remote_code)
        return _COUNTED[key]

    @classmethod
    def _count(cls, model_config: PreTrainedConfig, trust_remote_code: bool) -> "UnitSizes":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
        parameters = list(model.parameters())
        total = sum(parameter.numel() for parameter in parameters)
        divisible = sum(parameter.numel() for parameter in parameters if rows_are_blocks(parameter))
        layers = layers_of(model)
        in_layers = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
        return cls(total, total - in_layers, in_layers / max(1, len(layers)), divisible / total)


_COUNTED: dict[str, UnitSizes] = {}  # by the model's configuration


def moments_share(sizes: UnitSizes, config: GSPOConfig, shards: int) -> float:
    """The part of the optimizer's moments that one of so many processes keeps."""
    if config.method == "adamw_8bit":
        return 1 - sizes.divisible * (1 - 1 / shards)
    return 1 / shards


def sharded_parts(
    parts: Mapping[str, float], sizes: UnitSizes, config: GSPOConfig, shards: int, trains: bool
) -> list[dict[str, float]]:
    """Bytes by part in one of so many processes, at the moments of which one is the peak.

    Args:
        parts: those of one process that has all weights.
        trains: in an update, and not in sampling, where all weights are gathered.
    """
    divided = {
        name: num_bytes / shards if name in DIVIDED else num_bytes for name, num_bytes in parts.items()
    }
    divided["optimizer"] = parts["optimizer"] * moments_share(sizes, config, shards)
    bytes_each = 4 if config.dtype == "float32" else 2
    if not trains:
        return [divided | {GATHERED: float(bytes_each * sizes.total)}]
    in_layers = bytes_each * (sizes.outside + 2 * sizes.layer)
    if config.method == "lora":
        return [divided | {GATHERED: in_layers}]
    in_layers += bytes_each * (sizes.outside + sizes.layer) + 4 * sizes.layer
    # When the gradients of the weights outside of the layers are summed, no activations are left.
    at_end = {name: num_bytes for name, num_bytes in divided.items() if name not in ("activations", "logits")}
    return [
        divided | {GATHERED: in_layers},
        at_end | {GATHERED: float((2 * bytes_each + 4) * sizes.outside)},
    ]


def with_masters(parts: Mapping[str, float], sizes: UnitSizes) -> dict[str, float]:
    """Parts of weights in bfloat16 with moments in 8 bits, as they are with float32 weights and AdamW."""
    float32 = 4.0 * sizes.total
    scaled = {"weights": float32, "optimizer": 2 * float32}
    if "gradients" in parts:
        scaled["gradients"] = 2 * parts["gradients"]
    return {**parts, **scaled}
