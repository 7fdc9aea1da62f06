"""The live line of a terminal, below all that is printed meanwhile, and lines in a log file, on tqdm."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any
from weakref import WeakSet

from tqdm import tqdm
from tqdm.utils import ObjectWrapper

from gspo import PROGRESS_DELAY_S
from gspo.printing import LINE_END, duration, say

TERMINAL_INTERVAL_S, LOG_INTERVAL_S = 1.0, 30.0  # seconds between two states
SEPARATOR, USUAL_WIDTH = "  ", 80
COLOUR_CODES = re.compile(r"\x1b\[[\d;]*m")


class LiveLine(tqdm):
    """A bar of tqdm whose text is made by a function. Rank 0 shows the innermost one, until its `with` ends.

    parts: makes what the line says, the most important first; a narrow terminal shows the first ones.
    stays: the last state stays in the terminal when the work ends, and is in the log.
    options: total, initial, desc and unit, as in tqdm.
    """

    monitor_interval = 0  # no thread draws
    _instances: WeakSet = WeakSet()  # apart from the bars of libraries, which are printed above the line
    _at_line_start = True  # False after text that goes on, such as a bar of a library

    def __init__(self, parts: Callable[[], Sequence[str]], stays: bool = False, **options: Any):
        self.parts, self.stays, self._redirections = parts, stays, ExitStack()
        options["disable"] = os.environ.get("RANK", "0") != "0"
        self.in_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not options["disable"]
        options["mininterval"] = TERMINAL_INTERVAL_S if self.in_terminal else LOG_INTERVAL_S
        options["file"] = getattr(sys.stderr, "_wrapped", sys.stderr)  # itself, within another line
        super().__init__(gui=True, delay=PROGRESS_DELAY_S, miniters=0, dynamic_ncols=True, **options)
        if self.in_terminal and self.pos == 0:  # the outermost
            LiveLine._at_line_start = True
            for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
                if stream.isatty():
                    self._redirections.enter_context(redirect(_Above(stream)))

    def __exit__(self, *_: Any) -> None:
        with self._redirections, self.get_lock():
            self.clear(text=LINE_END if self.stays and self.display() else "")
            self.close()
            self.display()

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the innermost line that is due, or log this one; False: none is. tqdm (gui=True) calls it."""
        lines = sorted(line for line in self._instances if hasattr(line, "start_t"))  # none half made
        due = [line for line in lines if line.format_dict["elapsed"] >= line.delay]
        if due and self.in_terminal:
            columns = self.format_dict["ncols"] or 0  # one less than there are: after the last it may wrap
            due[-1].clear(text=fitted(due[-1].parts(), columns if columns > 0 else USUAL_WIDTH - 1))
        elif due and due[-1] is self:
            say(SEPARATOR.join(self.parts()), self.fp)
        return bool(due)

    def clear(self, nolock: bool = False, text: str = "") -> None:
        if self.in_terminal and self._at_line_start:
            say(f"\r{text}\x1b[K", self.fp, end="")  # instead of what the line shows


class Bar(LiveLine):
    """Counts the steps of some work, such as "evaluating 16/50 problems"."""

    def __init__(self, total: int, description: str, unit: str):
        super().__init__(self._parts, total=total, desc=description, unit=unit)

    def _parts(self) -> list[str]:
        done = f"{self.desc} {self.n}/{self.total} {self.unit}"
        left = self.format_dict["elapsed"] / (self.n or 1) * (self.total - self.n)
        return [done, f"{duration(left)} left"] if self.n else [done]


class _Above(ObjectWrapper):
    """A terminal's stream while there is a live line: its text appears above the line."""

    def write(self, text: str) -> int:
        with LiveLine.external_write_mode(file=self._wrapped):  # clears the line, and draws it afterwards
            shown = COLOUR_CODES.sub("", text)
            LiveLine._at_line_start = shown.endswith(("\n", "\r")) if shown else LiveLine._at_line_start
            return self._wrapped.write(text)

    def __eq__(self, other: object) -> bool:  # tqdm asks whether a file is sys.stdout or sys.stderr
        return self._wrapped == getattr(other, "_wrapped", other)


def fitted(parts: Sequence[str], width: int) -> str:
    """Return the first parts in a line, as many as fit the width."""
    text = SEPARATOR.join(parts)
    return text[:width] if len(text) <= width or len(parts) < 2 else fitted(parts[:-1], width)
