"""The run in trackio, on this machine: `trackio show` opens its dashboard. A resumed run goes on in its own.

Nothing leaves the machine, unless the environment variables TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say so.
"""

import io
import uuid
from contextlib import redirect_stdout
from typing import Any

from gspo.training.trackers import Tracker, tables


class Trackio(Tracker):
    name = "trackio"
    run: Any

    def start(self, settings: dict, step: int) -> None:
        import trackio  # here, since most runs do not use it

        # trackio knows a run by its name alone, and folders in two places may have the same.
        name = self.once("trackio_name", f"{self.folder.name}-{uuid.uuid4().hex[:6]}")
        with redirect_stdout(io.StringIO()):  # its greeting has control characters
            self.run = trackio.init(
                project=settings["wandb_project"],
                name=name,
                config=settings,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def log_texts(self, step: int, samples: list[dict], held_out: list[dict]) -> None:
        import trackio

        given = {name: trackio.Table(*table) for name, table in tables(samples, held_out).items()}
        if given:
            self.run.log(given, step=step)

    def summarise(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def finish(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.run.finish()
