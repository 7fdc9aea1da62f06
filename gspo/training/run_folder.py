"""A run's folder on disk: who may work in it, and what is written into it whole.

gspo_outputs/<run>/
    config.json       the resolved configuration, with versions, hardware, git commit, command line
    metrics.jsonl     one line per rollout batch
    eval.jsonl        one line per evaluation
    samples.jsonl     the best and the worst response of a group per rollout batch, with rewards
    eval_samples.jsonl            held-out problems with their responses, at each evaluation
    checkpoints/step-N/           see checkpoints.py
    best_model/  final_model/     what from_pretrained loads
    emergency/        the reason, metrics and rollout batch of an emergency stop
"""

import fcntl
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from gspo.training.alarms import EmergencyStop
from gspo.training.checkpoints import checkpoints_in
from gspo.training.find_run import make_new_folder
from gspo.training.hardware import describe_environment
from gspo.training.rollout_batch import RolloutBatch
from gspo.training.whole_folders import sync, whole_folder, write_whole


def describe_function(function: Any) -> dict:
    """What config.json says of a reward function: its name, its file and the file's SHA-256.

    A reward function with an attribute `source` says so itself.
    """
    if hasattr(function, "source"):
        return function.source
    definition = function if inspect.isroutine(function) else type(function)
    described = {"function": f"{definition.__module__}.{definition.__qualname__}"}
    path = getattr(sys.modules.get(definition.__module__), "__file__", None)
    if path and Path(path).is_file():
        described |= {"file": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    return described


class RunFolder:
    """A locked run folder. The lock ends with close(), or with the process.

    own_name: the name is nobody's choice, and the folder gets another one if it is taken.

    Raises:
        ValueError: the folder cannot be made, or another process works in it.
    """

    def __init__(self, path: Path, own_name: bool = False):
        self.path = path
        self._lock: int | None = None
        try:
            if own_name:
                self.path = path = make_new_folder(path)
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ValueError(f"another process is at work on the run in {path}: wait for it") from None
        except OSError as error:
            self.close()
            raise ValueError(f"--output_dir: cannot make {path} ({error.strerror})") from None

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_config(self, config: dict) -> None:
        """Write config.json: the settings, what is trained on, and the machine. Raises CannotSave."""
        settings = {**config, "environment": describe_environment()}
        write_whole(self.path / "config.json", json.dumps(settings, indent=2) + "\n")

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints, oldest first."""
        return checkpoints_in(self.path)

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """whole_folder() of a folder in this one, after the record's lines are on the disk.

        Weights that several of the run's folders have are on the disk once.
        """
        for path in self.path.glob("*.jsonl"):
            sync(path)
        folders = [*self.checkpoints(), self.path / "best_model", self.path / "final_model"]
        others = [path for path in folders if path != self.path / name and not path.is_symlink()]
        return whole_folder(self.path / name, others)

    def keep_evidence(self, step: int, stop: EmergencyStop, batches: Sequence[RolloutBatch]) -> None:
        """Write emergency/: why the run stopped, with the metrics, and the rollout batch if there is one."""
        with self.writing("emergency") as folder:
            # NaN is not valid JSON and is written as text.
            evidence = {"step": step, "reason": str(stop), "advice": stop.advice, **stop.metrics}
            figures = json.loads(json.dumps(evidence, default=str), parse_constant=str)
            (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
            for batch in batches:
                lines = [json.dumps(record, default=str) + "\n" for record in batch.records()]
                (folder / "samples.jsonl").write_text("".join(lines))
                torch.save(batch.state_dict(), folder / "rollout_batch.pt")
