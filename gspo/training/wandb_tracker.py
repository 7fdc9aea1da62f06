"""The run in wandb. WANDB_MODE is honoured, offline included. A resumed run goes on in the same wandb run."""

import uuid
from typing import Any

from gspo.training.trackers import PREFIXES, Tracker, tables


class Wandb(Tracker):
    name = "wandb"
    run: Any

    def start(self, settings: dict, step: int) -> None:
        import wandb  # here, since most runs do not use it

        self.run = wandb.init(
            project=settings["wandb_project"],
            name=self.folder.name,
            dir=str(self.folder),
            config=settings,
            id=self.once("wandb_id", uuid.uuid4().hex),
            resume="allow",
        )
        self.run.define_metric("rollout_batch")
        for prefix in PREFIXES.values():
            self.run.define_metric(f"{prefix}/*", step_metric="rollout_batch")

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.run.log({"rollout_batch": step, **figures})

    def log_texts(self, step: int, samples: list[dict], held_out: list[dict]) -> None:
        import wandb

        given = {name: wandb.Table(*table) for name, table in tables(samples, held_out).items()}
        if given:
            self.run.log({"rollout_batch": step, **given})

    def summarise(self, step: int, figures: dict[str, float]) -> None:
        self.run.summary.update(figures)

    def finish(self) -> None:
        self.run.finish()
