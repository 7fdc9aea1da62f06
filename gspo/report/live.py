"""The curves of a run while it runs, and its page at the end: a sink of the record."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from gspo.report.curves import draw_curves
from gspo.report.page import write_page
from gspo.report.run_record import read_run

# Drawing takes at most this share of the run's time.
DRAWING_SHARE = 0.005


class LiveReport:
    """Redraws training_curves.png as the run goes on, and writes report.html at its end.

    It never ends a run: what prevents drawing, such as a full disk, is said once on standard error.
    Sinks that write the run's files come before it.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic):
        self.folder, self.clock = folder, clock
        self.started = clock()
        self.spent, self.last = 0.0, 1.0  # seconds of all drawings, and of the last one or at least 1
        self.failed = False

    def write(self, stream: str, step: int, values: dict) -> None:
        """Redraw after a rollout batch or an evaluation, if there is time for it."""
        allowed = DRAWING_SHARE * (self.clock() - self.started)
        if stream in ("metrics", "eval") and self.spent + self.last <= allowed:
            self._draw(going=True)

    def close(self) -> None:
        """Draw the curves a last time, and the page."""
        self._draw(going=False)

    def _draw(self, going: bool) -> None:
        start = self.clock()
        try:
            run = read_run(self.folder, going)
            if not going:  # first, since it needs no matplotlib
                write_page([run], self.folder / "report.html")
            draw_curves(run, self.folder / "training_curves.png")
        except Exception as error:  # a picture must not end a run, whatever matplotlib or the disk raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if not self.failed:
                print(f"curves and report: {reason}; all is in the run's files", file=sys.stderr)
            self.failed = True
        self.last = max(1.0, self.clock() - start)
        self.spent += self.last
