"""A run's checkpoints: which there are, which is whole, and what they hold besides the weights.

checkpoints/step-N/ holds the model and the tokenizer as from_pretrained loads them, and STATE_FILE. The
newest checkpoint also has MOMENTS_FILE. With sharded weights there are WEIGHTS and MOMENTS instead.
"""

import random
import re
import sys
from pathlib import Path

import numpy as np
import torch

from gspo.policy.saved_model import SHARDED_WEIGHTS
from gspo.training.whole_folders import damage, drop_files, listed

STATE_FILE = "training_state.pt"
# The optimizer's moments: with AdamW twice the size of the weights. An older checkpoint has them no more.
MOMENTS_FILE = "optimizer_moments.pt"
# Folders with the parts that each process has, if the weights are sharded (sharded_checkpoint.py).
WEIGHTS, MOMENTS = SHARDED_WEIGHTS, "sharded_moments"
# The version of what STATE_FILE holds. A checkpoint of another version is refused, not misread.
STATE_FORMAT = 4


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name) and p.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of rollout batches trained on at a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_whole(candidates: list[Path]) -> Path | None:
    """The last whole one of these checkpoints (oldest first). Damaged ones are named on standard error."""
    for path in reversed(candidates):
        reason = damage(path, STATE_FILE)
        if reason is None:
            return path
        print(f"{path} is not used: {reason}", file=sys.stderr)
    return None


def write_state(checkpoint: Path, state: dict) -> None:
    """Write the training state into a new checkpoint."""
    torch.save({"format": STATE_FORMAT, **state}, checkpoint / STATE_FILE)


def write_moments(checkpoint: Path, moments: dict) -> None:
    """Write the optimizer's moments, the "state" of its state_dict(), into a new checkpoint."""
    torch.save(moments, checkpoint / MOMENTS_FILE)


def read_moments(checkpoint: Path, lazily: bool) -> dict:
    """The moments of write_moments(), on the CPU.

    Args:
        lazily: read them from the file only when they are used, for weights that are elsewhere.
    """
    return torch.load(checkpoint / MOMENTS_FILE, map_location="cpu", weights_only=True, mmap=lazily)


def drop_moments(checkpoint: Path) -> None:
    """Free the room that the optimizer's moments take. A link to a folder elsewhere is left alone."""
    if not checkpoint.is_symlink():
        left_over = (path.name for path in (checkpoint / MOMENTS).glob("*"))  # of a kill in between
        drop_files(checkpoint, [MOMENTS_FILE, *(f"{MOMENTS}/{name}" for name in left_over)])


def moment_files(checkpoint: Path) -> list[str]:
    """The files of the optimizer's moments; an older checkpoint has none."""
    return [name for name in listed(checkpoint) if name == MOMENTS_FILE or name.startswith(f"{MOMENTS}/")]


def read_state(checkpoint: Path) -> dict:
    """The training state of a checkpoint on the CPU, without the optimizer's moments.

    Raises:
        ValueError: another version of this toolkit wrote it.
    """
    state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
    if state.get("format") != STATE_FORMAT:
        raise ValueError(
            f"--resume {checkpoint}: another version of this toolkit wrote it; go on with that one, or start "
            "anew from the run's best_model (--model_name)"
        )
    return state


def random_states() -> dict:
    """The states of the global random generators of Python, numpy and torch, as plain data and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict) -> None:
    """Restore what random_states() returned; those of GPUs only if there are as many GPUs as then."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
