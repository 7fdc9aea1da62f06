"""The run in wandb. WANDB_MODE is honoured, offline included. A resumed run goes on in the same wandb run."""

import uuid
from typing import Any

from gspo.training.trackers import PREFIXES, Tracker, held_out_rows, sample_rows
from gspo.training.whole_folders import write_whole


class Wandb(Tracker):
    name = "wandb"
    run: Any

    def start(self, settings: dict, step: int) -> None:
        import wandb  # here, since most runs do not use it

        id_path = self.folder / "wandb_id"
        if not id_path.exists():
            write_whole(id_path, uuid.uuid4().hex)
        self.run = wandb.init(
            project=settings["wandb_project"],
            name=self.folder.name,
            dir=str(self.folder),
            config=settings,
            id=id_path.read_text(encoding="utf-8"),
            resume="allow",
        )
        self.run.define_metric("rollout_batch")
        for prefix in PREFIXES.values():
            self.run.define_metric(f"{prefix}/*", step_metric="rollout_batch")

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.run.log({"rollout_batch": step, **figures})

    def log_texts(self, step: int, samples: list[dict], held_out: list[dict]) -> None:
        import wandb

        tables = {"samples": sample_rows(samples), "held_out": held_out_rows(held_out)}
        given = {name: wandb.Table(columns, rows) for name, (columns, rows) in tables.items() if rows}
        if given:
            self.run.log({"rollout_batch": step, **given})

    def summarise(self, step: int, figures: dict[str, float]) -> None:
        self.run.summary.update(figures)

    def finish(self) -> None:
        self.run.finish()
