"""A sharded model goes from files into shards and back into files, and no process has all of it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from support import sharded_files
from support.models import FAMILIES
from support.on_ranks import on_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it"),
]


def tensors_in(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def test_exported_files_hold_what_one_process_writes(tmp_path):
    names = ["tiny", "tiny-moe", *FAMILIES]
    on_ranks(2, sharded_files.export, tmp_path, json.dumps(names))
    for folder in (tmp_path / name / dtype for name in names for dtype in ("None", "torch.bfloat16")):
        one, sharded = folder / "one", folder / "sharded"
        expected, found = tensors_in(one), tensors_in(sharded)
        assert found.keys() == expected.keys(), folder
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (folder, name)
        others = [path.name for path in one.iterdir() if path.suffix != ".safetensors"]
        assert {"config.json", "generation_config.json"} <= set(others)
        for name in others:
            assert (sharded / name).read_text() == (one / name).read_text(), (folder, name)
        index = json.loads((sharded / "model.safetensors.index.json").read_text())
        files = {file: load_file(sharded / file) for file in set(index["weight_map"].values())}
        assert len(files) > 2 and {path.name for path in sharded.glob("*.safetensors")} == set(files)
        assert all(name in files[file] for name, file in index["weight_map"].items())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_processes_wait_for_a_slow_file_and_share_the_error_of_a_failed_one(tmp_path):
    on_ranks(2, sharded_files.export_slowly, tmp_path)
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 3
    assert not (tmp_path / "damaged" / "model.safetensors.index.json").exists()
