"""The machine that a run uses: devices, compute type, memory, and its description for config.json."""

import os
import platform
import resource
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from gspo.policy.memory import Workload
from gspo.policy.rollout import MAX_ROWS
from gspo.training.config import GSPOConfig

# Models with fewer parameters are slower in bfloat16 on a CPU: the casts cost more than the products save.
SMALL_MODEL = 20e6


def choose_device(device: str | None) -> str:
    """The device that is asked for; None takes the GPU if there is one.

    Raises:
        ValueError: cuda is asked for and torch finds no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave the flag out, or give --device cpu")
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def choose_dtype(config: GSPOConfig, device: str, num_parameters: int) -> tuple[str, str]:
    """The compute type, and the reason for it."""
    if config.dtype != "auto":
        return config.dtype, "as given"
    if config.optimizer == "adamw_8bit":
        return "bfloat16", "the weights themselves are in bfloat16"
    if device == "cuda":
        return "bfloat16", "the GPU multiplies it many times faster"
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return "float32", "this CPU has no bfloat16 multiplication"
    if num_parameters < SMALL_MODEL:
        return "float32", "for a model this small, casting costs more than bfloat16 saves"
    return "bfloat16", "this CPU multiplies it about twice as fast"


def peak_memory_gb() -> float:
    """Peak memory so far, in GB: allocated on the GPU, or resident in the process if there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def num_cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_processes() -> int:
    """The number of processes that train together, as torchrun and accelerate's launcher set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def workload(config: GSPOConfig) -> Workload:
    """What a run does with its model, as far as its memory on one GPU depends on it."""
    own_updated = -(-config.mini_batch_size * config.group_size // num_processes())
    return Workload(
        micro_batch_tokens=config.micro_batch_tokens or Workload.micro_batch_tokens,
        max_length=config.max_length,
        updated_rows=own_updated,
        sampled_rows=max(MAX_ROWS, config.group_size, config.eval_samples or 0),  # whole groups
        reference=config.kl_coef > 0,
        gradient_checkpointing=bool(config.gradient_checkpointing),
        bfloat16=config.dtype != "float32",
    )


def describe_environment() -> dict:
    """Versions, hardware, git commit and command line, for config.json."""
    return {
        "command_line": sys.argv,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "platform": platform.platform(),
        "cpu_cores": num_cores(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": num_processes(),
    }


def _git_commit() -> str | None:
    """The commit of this toolkit's own checkout; None if it is not one, or if git is not installed."""
    if not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "HEAD"]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
