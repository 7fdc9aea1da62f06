"""Progress bars: one live line in a terminal, whole lines in a log file."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

from gspo import PROGRESS_DELAY_S

# Seconds between two states of a bar: in a terminal, and in a log file, where each state is a line.
TERMINAL_INTERVAL_S, LOG_INTERVAL_S = 0.5, 30.0


class _WholeLines:
    """Writes every state of a bar as a line with a line end, without carriage returns and padding."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> None:
        state = text.replace("\r", "").strip()
        if state:
            self.file.write(state + "\n")

    def flush(self) -> None:
        self.file.flush()


def progress_bar(shown: bool = True, **options: Any) -> tqdm:
    """A tqdm bar on standard error that appears after PROGRESS_DELAY_S.

    Args:
        shown: False for a bar that only counts, as on all ranks but 0.
        options: tqdm's own.
    """
    if sys.stderr.isatty():
        file, interval = sys.stderr, TERMINAL_INTERVAL_S
    else:
        file, interval = _WholeLines(sys.stderr), LOG_INTERVAL_S
    return tqdm(
        disable=not shown,
        file=file,
        mininterval=interval,
        delay=PROGRESS_DELAY_S,
        dynamic_ncols=True,
        **options,
    )
