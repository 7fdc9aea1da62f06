"""Folders on disk that are whole or not there, and proof of it before one is trusted.

step-12.partial/     being written; a kill leaves it, the next start removes it
step-12/             whole: every file was on the disk before the folder got its name
step-12.previous/    what step-12 replaces; a kill between two renames leaves it alone, and it is put back
SHA256SUMS           in each, with the number of its files; `sha256sum -c SHA256SUMS` checks it by hand
"""

import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

CHECKSUMS = "SHA256SUMS"


class CannotSave(RuntimeError):
    """Something could not be written: the disk is full, most often."""


@contextmanager
def saving(path: Path):
    """Turns what libraries raise on a full or broken disk into CannotSave, with a message of one line."""
    try:
        yield
    except CannotSave:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch, safetensors raise their own
        reason = str(error).strip().splitlines()
        raise CannotSave(f"cannot write {path}: {reason[0] if reason else type(error).__name__}") from error


@contextmanager
def whole_folder(target: Path):
    """A new folder to fill, which takes target's place when complete.

    Raises:
        CannotSave: it could not be completed; target is as it was, and nothing else is left.
    """
    partial, previous = (target.with_name(f"{target.name}.{part}") for part in ("partial", "previous"))
    with saving(target):
        try:
            remove(partial)
            partial.mkdir(parents=True)
            yield partial
            _write_checksums(partial)
            for path in (partial, *partial.rglob("*")):
                sync(path)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if os.path.lexists(target):
            remove(previous)
            target.rename(previous)
        partial.rename(target)
        sync(target.parent)
        shutil.rmtree(previous, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with saving(path):
        try:
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def recover(parent: Path) -> None:
    """Undo what a kill left half done in a folder: replaced ones without a successor return, pieces go."""
    for previous in parent.glob("*.previous"):
        target = previous.with_suffix("")
        if os.path.lexists(target):
            remove(previous)
        else:
            previous.rename(target)
    for partial in parent.glob("*.partial"):
        remove(partial)


def remove(path: Path) -> None:
    """Whatever is there: a folder, a file, a link (not what it points to), nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def damage(folder: Path, needed: str) -> str | None:
    """What is wrong with a folder, by its checksums, or None.

    needed: a file without which it is of no use.
    """
    try:
        header, *lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines() or [""]
    except (OSError, UnicodeDecodeError):
        return f"it has no readable {CHECKSUMS}"
    listed = dict(reversed(line.split("  ", 1)) for line in lines if "  " in line)
    if header != _header(len(listed)):
        return f"{CHECKSUMS} is cut short or damaged"
    missing = [name for name in (needed, *listed) if name not in listed or not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    damaged = [name for name, digest in listed.items() if _digest(folder / name) != digest]
    return f"{damaged[0]} is cut short or damaged" if damaged else None


def checkpoints_in(folder: Path) -> list[Path]:
    """A run folder's checkpoints, oldest first."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name) and p.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_whole(
    candidates: Sequence[Path], needed: str, refused: Callable[[Path, str], None]
) -> Path | None:
    """The last of the checkpoints (oldest first) that is whole; those passed over are told to refused."""
    for path in reversed(candidates):
        reason = damage(path, needed)
        if reason is None:
            return path
        refused(path, reason)
    return None


# ---- random states


def random_states() -> dict:
    """Of every generator that a reward function or a model may draw from, as plain data and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict) -> None:
    """As random_states() found them; GPUs' only where there are as many as then."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _write_checksums(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join([_header(len(files)) + "\n", *lines]), encoding="utf-8")


def _header(count: int) -> str:
    """First line of SHA256SUMS, a comment to sha256sum: it shows when the list was cut short."""
    return f"# {count} files"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or a folder's names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
