"""The run's figures in wandb, under train/ and eval/. WANDB_MODE is honoured, offline included."""

import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gspo.training.whole_folders import write_whole

# Seconds that wandb may take before the run goes on without it.
WANDB_START_S, WANDB_CALL_S, WANDB_FINISH_S = 120, 30, 120
# The record's streams that go to wandb, and the prefixes of their figures there.
PREFIXES = {"metrics": "train", "eval": "eval"}


class Wandb:
    """A sink of the record. A resumed run goes on in the same wandb run.

    If wandb raises or hangs, this is reported once and the run goes on without it.
    """

    def __init__(self, folder: Path, config: dict):
        self.run: Any = None
        self._attempt(lambda: self._start(folder, config), WANDB_START_S)

    def _start(self, folder: Path, config: dict) -> None:
        import wandb  # here, since most runs do not use it

        id_path = folder / "wandb_id"
        if not id_path.exists():
            write_whole(id_path, uuid.uuid4().hex)
        run = wandb.init(
            project=config["wandb_project"],
            name=folder.name,
            dir=str(folder),
            config=config,
            id=id_path.read_text(encoding="utf-8"),
            resume="allow",
        )
        run.define_metric("rollout_batch")
        for prefix in PREFIXES.values():
            run.define_metric(f"{prefix}/*", step_metric="rollout_batch")
        self.run = run

    def write(self, stream: str, step: int, values: dict) -> None:
        if self.run and stream in PREFIXES:
            named = {f"{PREFIXES[stream]}/{name}": value for name, value in values.items()}
            self._attempt(lambda: self.run.log({"rollout_batch": step, **named}), WANDB_CALL_S)

    def close(self) -> None:
        if self.run:
            self._attempt(self.run.finish, WANDB_FINISH_S)

    def _attempt(self, call: Callable[[], Any], seconds: float) -> None:
        """Do call() in a thread of its own, since it may raise or hang."""
        errors: list[str] = []

        def attempt() -> None:
            try:
                call()
            except BaseException as error:  # wandb ends threads of its own with SystemExit
                errors.append(f"{type(error).__name__}: {error}".splitlines()[0])

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            errors.append(f"no answer within {seconds:.0f} s")
        if errors:
            self.run = None
            print(f"wandb: {errors[0]}; the run goes on without it, all is in its folder", file=sys.stderr)
