"""Make the configuration of a run whose processes have GPUs of unequal memory, for test_processes.py."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch

import train_gspo
from gspo.training import plan as plans
from gspo.training import processes
from gspo.training.config import GSPOConfig
from gspo_implementation import gspo_loss, resolve


class _PretendProcesses(processes.Processes):
    """Processes on the CPU that take themselves for processes on GPUs."""

    def __init__(self, device):
        super().__init__("cpu")
        self.device = torch.device("cuda", 0)


def configurations(folder, gigabytes):
    """Write what each process would train with, from the command line and from Python.

    gigabytes: those of each process's GPU, as JSON.
    """
    gb = json.loads(gigabytes)[int(os.environ["RANK"])]
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_name = lambda *_: "A GPU"
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(total_memory=gb * 10**9)
    processes.Processes = _PretendProcesses
    # An update takes 20 GB with AdamW and 10 with 8-bit moments, and each sampled row 0.2 GB.
    plans.measure_update = lambda _, config, *__: {"weights": 2e10 if config.method == "adamw" else 1e10}
    plans.measure_sampling = lambda _, config, __: {"cache": 2e8 * config.rollout_rows}
    flags = ["--model_name", "smollm2-135m", "--dataset", "math", "--shard", "none"]
    from_flags = train_gspo.resolve_for_processes(train_gspo.parse(flags))
    config = GSPOConfig(shard="none")
    shapes = train_gspo.config_of_model(from_flags)
    group = processes.Processes("cuda")
    from_python = plans.fit_to_gpu(config, shapes, resolve(config, 10**9), gspo_loss, group)
    found = [dataclasses.asdict(found) for found in (from_flags, from_python)]
    Path(folder, f"{group.rank}.json").write_text(json.dumps(found))
