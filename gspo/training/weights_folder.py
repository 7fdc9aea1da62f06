"""The folder through which servers get the weights, and the removal of those that runs have left behind.

It is in shared memory if all servers are on this machine, else in the directory of the runs, which the
servers' machines must share. However a run ends, the next one removes what is left of it.
"""

import fcntl
import os
import secrets
import shutil
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from gspo.training.hardware import num_machines
from gspo.training.whole_folders import saving

SHARED_MEMORY = Path("/dev/shm")
# The names of the folders begin with this.
PREFIX = "gspo-weights-"
# A file in each, locked as long as its run lives.
LOCK = "lock"


class WeightsFolder:
    """A folder of this run's own. It is removed by close(), or when this process ends.

    Args:
        urls: the servers; none: they are on this machine.
        output_dir: the directory of the runs.
        num_bytes: the size of the weights.

    Raises:
        CannotSave: the folder cannot be made.
    """

    def __init__(self, urls: Sequence[str], output_dir: str, num_bytes: int) -> None:
        parents = [Path(output_dir).absolute()]
        on_one_machine = num_machines() == 1
        if on_one_machine and all(map(_is_local, urls)) and os.access(SHARED_MEMORY, os.W_OK):
            parents.insert(0, SHARED_MEMORY)
        for parent in parents:
            remove_abandoned(parent)
        if len(parents) > 1 and shutil.disk_usage(SHARED_MEMORY).free < 1.1 * num_bytes:
            del parents[0]
        self.path = parents[0] / f"{PREFIX}{secrets.token_hex(4)}"
        with saving(self.path):
            self.path.mkdir(parents=True)
            lock = _locked(self.path / LOCK)
        self.close = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def new(self, name: str) -> Path:
        """Make an empty folder in it. All others are removed first, so that there is room."""
        for other in self.path.glob("*/"):
            shutil.rmtree(other)
        folder = self.path / name
        folder.mkdir(parents=True)  # the whole path: some systems clear shared memory when a user logs out
        return folder


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of runs that are gone."""
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError):  # its run is going
            with _locked(lock):
                shutil.rmtree(lock.parent)


def _locked(path: Path) -> IO[str]:
    """The file, locked until it is closed. Raises OSError if another process holds its lock."""
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _remove(path: Path, lock: IO[str], process: int) -> None:
    lock.close()
    if os.getpid() == process:  # not when a fork of it ends
        shutil.rmtree(path, ignore_errors=True)


def _is_local(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
