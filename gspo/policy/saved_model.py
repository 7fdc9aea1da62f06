"""Write a model into a folder that from_pretrained loads, and read weights back into a model.

transformers 5 saves some settings under names that transformers 4 does not know. Tools for serving and
evaluation still use transformers 4, which then takes its defaults without a word: a rope_theta of 10000,
for instance. So these settings are written under both names. tests/policy/test_saved_model.py tries 4.57.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from gspo.policy.sharded_model import (
    copy_whole,
    is_first_process,
    is_sharded,
    plain_class,
    state_by_unit,
    whole_tensor,
)

# The folder, in a checkpoint of several processes, with the part that each of them has.
SHARDED_WEIGHTS = "sharded_weights"


def save_model(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the weights, in this type (None: as they are), and the configuration.

    Of several processes, the first one writes. If the model is sharded, all of them call this together, and
    no process has more than a layer of the whole weights.

    Raises:
        OSError: they cannot be written. Of a sharded model, all processes raise it.
    """
    if is_sharded(model):
        _write_by_unit(model, folder, dtype)
    elif is_first_process():
        _write(model, folder, dtype, None if dtype is None else _cast(model.state_dict(), dtype))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer."""
    tokenizer.save_pretrained(folder)
    with _edited(folder / "tokenizer_config.json") as saved:
        for loading in ("is_local", "local_files_only"):  # how it was loaded here
            saved.pop(loading, None)
        # tokenizer.json has all that the tokenizer does, and this class does no more. transformers 4 lacks
        # some of the classes of 5, and others add tokens by defaults of their own.
        if saved.pop("backend", None) == "tokenizers":
            saved["tokenizer_class"] = "PreTrainedTokenizerFast"
            saved["model_input_names"] = tokenizer.model_input_names
        # transformers 4 has a list under another name, and under this one a dictionary.
        if isinstance(saved.get("extra_special_tokens"), list):
            saved["additional_special_tokens"] = saved.pop("extra_special_tokens")
        if named := saved.get("model_specific_special_tokens"):
            saved["extra_special_tokens"] = named


def load_weights(model: Any, folder: Path) -> None:
    """Give the model the weights of save_model(). They keep the model's type and device.

    Of a sharded model, each process takes its part. Otherwise the present weights are given up first, so that
    two models are never in memory.
    """
    if is_sharded(model):
        # In the type of the files, it takes no memory but the files' own pages, which processes share.
        saved = plain_class(model).from_pretrained(folder, dtype="auto")
        for parameter, source in zip(model.parameters(), saved.parameters(), strict=True):
            copy_whole(parameter, source.data)
        return
    shapes = [parameter.shape for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    # from_pretrained(), since mixtures of experts have other names and shapes on disk.
    saved = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)
    for parameter, source, shape in zip(model.parameters(), saved.parameters(), shapes, strict=True):
        assert source.shape == shape, "the checkpoint is of another model"
        # A copy: source may be the file itself, mapped into memory, and its checkpoint is removed some day.
        parameter.data = source.data.to(parameter.device, parameter.dtype, copy=True)
        source.data = source.data.new_empty(0)


def _cast(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights on the CPU and, but for integers, in this type. Tied weights stay tied."""
    cast: dict[tuple, torch.Tensor] = {}
    result = {}
    for name, tensor in weights.items():
        storage = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape
        if storage not in cast:
            cast[storage] = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        result[name] = cast[storage]
    return result


def _write(model: Any, folder: Path, dtype: torch.dtype | None, weights: dict[str, Any] | None) -> None:
    """Write the configuration, and these weights; None: the model's own."""
    model.save_pretrained(folder, state_dict=weights)
    with _edited(folder / "config.json") as saved:
        if dtype is not None:
            saved["dtype"] = str(dtype).removeprefix("torch.")
        _add_older_names(saved, model.config)


def _write_by_unit(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a sharded model, a file for each unit: gathered by all processes, written by the first one."""
    model.sharding.on_first_process(_write, model, folder, dtype, {})  # the configuration alone
    files: dict[str, str] = {}
    total_size = 0
    units = state_by_unit(model)
    for number, tensors in enumerate(units, 1):
        name = f"model-{number:05d}-of-{len(units):05d}.safetensors"
        weights = _gathered(tensors, dtype)
        saved = model.sharding.on_first_process(_write_file, model, folder / name, weights)
        files |= dict.fromkeys(saved, name)
        total_size += sum(saved.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": files}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    model.sharding.on_first_process((folder / SAFE_WEIGHTS_INDEX_NAME).write_text, text)


def _gathered(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The whole tensors as _cast() has them, in the first process; in the others nothing."""
    result = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor)
        if is_first_process():
            result[name] = whole.to("cpu", dtype if whole.is_floating_point() else None)
    return result


def _write_file(model: Any, path: Path, weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """Write weights under the names and in the shapes that files have. Returns their sizes in bytes."""
    for name in model._keys_to_ignore_on_save or ():
        weights.pop(name, None)
    # In a mixture of experts, a layer has all its experts in one tensor. In the files each has its own.
    saved = {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, weights).items()}
    save_file(saved, path, metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in saved.items()}


@contextmanager
def _edited(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what is in a JSON file, and write it back."""
    content = json.loads(path.read_text(encoding="utf-8"))
    yield content
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _add_older_names(saved: dict[str, Any], config: Any) -> None:
    """Add to a configuration, as transformers 5 saves it, what transformers 4 reads."""
    if "dtype" in saved:
        saved["torch_dtype"] = saved["dtype"]
    for other_name, name in config.attribute_map.items():
        if name in saved:
            saved.setdefault(other_name, saved[name])
    older = saved | _older_rope(saved.get("rope_parameters") or {})
    # Some families of transformers 5 alone would misread the names that they never had.
    if "rope_parameters" in saved:
        read_back = type(config)(**deepcopy(older))
        if read_back.rope_parameters == config.rope_parameters:
            saved.update(older)
    for name in config.sub_configs:
        if isinstance(saved.get(name), dict):
            _add_older_names(saved[name], getattr(config, name))


def _older_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The settings of rotary positions under the names of transformers 4."""
    older = {}
    if "full_attention" in rope:  # one entry for each type of layer; transformers 4 scales this one alone
        older["rope_local_base_freq"] = rope.get("sliding_attention", {}).get("rope_theta")
        rope = rope["full_attention"]
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            older[name] = rope[name]
    scaling = {name: value for name, value in rope.items() if name not in older}
    if "long_factor" in rope:  # Phi-3, which refuses any other entry
        scaling = {name: rope[name] for name in ("short_factor", "long_factor")} | {"type": "longrope"}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = scaling
    return older
