"""The same model with fewer layers: what its layers have in common is measured on a few of them."""

from collections.abc import Hashable
from copy import deepcopy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

# An attribute of a layer by which equal layers differ.
PLACE_OF_LAYER = "layer_idx"


def num_layers(config: PreTrainedConfig) -> int:
    """Return the number of a model's decoder layers."""
    return config.get_text_config(decoder=True).num_hidden_layers


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the configuration of the same model with fewer layers."""
    shortened = deepcopy(config)
    text = shortened.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return shortened


def decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    """Return the model's decoder layers; None if it is not clear which they are."""
    layers = num_layers(model.config)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == layers]
    return lists[0] if len(lists) == 1 else None


def has_equal_layers(config: PreTrainedConfig, layers: int, trust_remote_code: bool = False) -> bool:
    """Return whether all layers of a model are alike, and like those of the same model with fewer layers."""
    kinds: set[Hashable] = set()
    for same in (config, with_layers(config, layers)):
        with torch.device("meta"):  # no memory for the weights
            model = AutoModelForCausalLM.from_config(same, trust_remote_code=trust_remote_code)
        found = decoder_layers(model)
        if found is None:
            return False
        kinds |= {_kind(layer) for layer in found}
    return len(kinds) == 1


def _kind(layer: nn.Module) -> Hashable:
    """Return a value that is equal for equal layers: modules, plain attributes and shapes of parameters."""
    modules = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str, type(None))) and key != PLACE_OF_LAYER
        }
        shapes = [(key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)]
        modules.append((name, type(module), tuple(sorted(plain.items(), key=str)), tuple(shapes)))
    return tuple(modules)
