"""The machine that a run uses: devices, compute type, memory, and its description for config.json."""

import os
import platform
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch

from gspo.training.config import GSPOConfig

# Models with fewer parameters are slower in bfloat16 on a CPU: the casts cost more than the products save.
SMALL_MODEL = 20e6
# The share of its memory that a plan may fill. The rest is for gaps between blocks of memory whose sizes
# change from pass to pass.
USABLE_SHARE = 0.9


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
    if config.rollout_engine == "vllm":
        return "float32", "in bfloat16, vLLM's rounding differs by more than --mismatch_mask allows"
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


def num_machines() -> int:
    """The number of machines that they are on, if each has as many."""
    return -(-num_processes() // processes_here())


def processes_here() -> int:
    """The number of them that are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes()))


def host_memory() -> float:
    """Bytes of main memory that this process may use: the machine's, or a container's if that is less."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, float(text))
    return total


@dataclass(frozen=True)
class Machine:
    """What a plan is made for.

    name: in words. total_bytes: the memory of a GPU, or of the machine if training is on the CPU.
    processes: how many such GPUs train together. machines: how many machines they are in.
    """

    name: str
    total_bytes: float
    processes: int = 1
    machines: int = 1

    @property
    def usable_bytes(self) -> float:
        return USABLE_SHARE * self.total_bytes

    @property
    def shards(self) -> int:
        """The parts of sharded weights: each machine has all of them."""
        return self.processes // self.machines

    def shards_with(self, shard: str) -> int:
        """The parts of the weights with a decided --shard."""
        return self.shards if shard == "full" else 1


def machine_for(plan_for: str | None, device: str) -> Machine:
    """The machine that --plan_for names, without it this one.

    plan_for: GB, GPUs x GB or machines x GPUs x GB, such as "80", "8x80" or "2x8x80".
    """
    if plan_for:
        *counts, size = plan_for.split("x")
        processes = prod(map(int, counts)) if counts else num_processes()
        name = f"a GPU of {size} GB" if processes == 1 else f"each of {processes} GPUs of {size} GB"
        return Machine(name, float(size) * 1e9, processes, int(counts[0]) if len(counts) == 2 else 1)
    if device == "cuda":
        total_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        name = f"{torch.cuda.get_device_name()} with {gigabytes(total_bytes)}"
        return Machine(name, total_bytes, num_processes(), num_machines())
    total_bytes = host_memory()
    return Machine(f"this machine's {gigabytes(total_bytes)}", total_bytes, num_processes(), num_machines())


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def describe_environment() -> dict:
    """Versions, hardware, git commit and command line, for config.json."""
    return {
        "command_line": sys.argv,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "peft")},
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
