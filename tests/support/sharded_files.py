"""Save, load and measure sharded models in several processes, for test_sharded_files.py."""

import json
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import distributed

from gspo.policy import saved_model
from gspo.policy.model_loader import load_model
from gspo.policy.saved_model import save_model
from gspo.policy.sharded_model import is_first_process, shard_model
from gspo.policy.tiny_models import TINY_NAMES
from gspo.training import processes
from gspo.training.processes import Processes
from support.models import make_model


def model_named(name):
    """A tiny model, or a random one of a family."""
    return load_model(name, device="cpu")[0] if name in TINY_NAMES else make_model(name).float()


def export(folder, names):
    """Save each model as one process does, in folder/NAME/one, and sharded, in folder/NAME/sharded."""
    torch.set_num_threads(1)
    sharding = Processes("cpu").sharding()
    for name in json.loads(names):
        model = model_named(name)
        for dtype in (None, torch.bfloat16):
            target = Path(folder) / name / str(dtype)
            save_model(model, target / "one", dtype)
            sharded = deepcopy(model)
            shard_model(sharded, sharding)
            if is_first_process():
                (target / "sharded").mkdir(parents=True)
            save_model(sharded, target / "sharded", dtype)


def export_slowly(folder):
    """The processes wait for 3 s in the middle of a computation; a file takes 6 s, and another cannot be."""
    processes.COMPUTING_PATIENCE_MIN = 3 / 60
    torch.set_num_threads(1)
    sharding = Processes("cpu").sharding()
    model = model_named("tiny")
    shard_model(model, sharding)
    write, calls = saved_model.save_file, iter(range(1000))

    def write_slowly(*arguments, **settings):
        if next(calls) == 0:
            time.sleep(6)
        write(*arguments, **settings)

    saved_model.save_file = write_slowly
    for name in ("whole", "damaged"):
        (Path(folder) / name).mkdir(exist_ok=True)
    save_model(model, Path(folder) / "whole")
    (Path(folder) / "damaged" / "model-00002-of-00003.safetensors").mkdir(exist_ok=True)
    with pytest.raises(OSError):
        save_model(model, Path(folder) / "damaged")
    distributed.barrier()  # all processes are where they were
