"""The live line of a terminal, and whole lines in a log file, on tqdm.

Such lines may be nested: the innermost is shown, and that of the work around it returns afterwards. Whatever
else is printed meanwhile, by print(), a warning or a library, appears above it. Where standard error is no
terminal, the state is a line with a line end every half minute, without control characters.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from typing import Any, Self, TextIO
from weakref import WeakSet

from tqdm import tqdm
from tqdm.utils import ObjectWrapper

from gspo import PROGRESS_DELAY_S

# Seconds between two states: in a terminal, and in a log file, where each state is a line.
TERMINAL_INTERVAL_S, LOG_INTERVAL_S = 1.0, 30.0
USUAL_WIDTH = 80  # of a terminal that does not tell its own
SEPARATOR, LINE_END = "  ", "\n"


class LiveLine(tqdm):
    """A bar of tqdm whose text is made by a function. Only rank 0 shows it.

    parts: makes what the line says, the most important first; a narrow terminal shows the first ones.
    stays: the last state stays in the terminal when the work ends, and is in the log.
    counts: total, initial, desc and unit, as in tqdm.
    """

    monitor_interval = 0  # no thread draws
    _instances: WeakSet = WeakSet()  # apart from the bars of libraries, which are printed above the line
    _open: list["LiveLine"] = []  # the outermost first
    _redirections = ExitStack()
    _at_line_start = True  # False after text that goes on, such as a bar of a library

    def __init__(self, parts: Callable[[], Sequence[str]], stays: bool = False, **counts: Any):
        self.parts, self.stays = parts, stays
        self.in_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        counts["mininterval"] = TERMINAL_INTERVAL_S if self.in_terminal else LOG_INTERVAL_S
        counts["disable"] = os.environ.get("RANK", "0") != "0"
        file = getattr(sys.stderr, "_wrapped", sys.stderr)
        super().__init__(file=file, delay=PROGRESS_DELAY_S, leave=False, miniters=0, dynamic_ncols=True, **counts)

    def __enter__(self) -> Self:
        if self.in_terminal and not self._open and not self.disable:
            LiveLine._at_line_start = True
            for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
                if stream.isatty():
                    self._redirections.enter_context(redirect(_Above(stream)))
        self._open += [] if self.disable else [self]
        return self

    def __exit__(self, *_: Any) -> None:
        if self.disable:
            return
        with self.get_lock():
            keeps = self.stays and self is self._innermost()
            if keeps:
                self.display()
            self._put(LINE_END if keeps else "")
            self._open.remove(self)
            self.close()
            self.display()
            if not self._open:
                self._redirections.close()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the innermost line, or write this one into the log. tqdm calls this when it is time."""
        line = self._innermost()
        if line is not None and self.in_terminal:
            columns = self.format_dict["ncols"] or 0  # one less than there are: after the last it may wrap
            self._put(fitted(line.parts(), columns if columns > 0 else USUAL_WIDTH - 1))
        elif line is self:
            say(SEPARATOR.join(self.parts()), self.fp)

    def clear(self, nolock: bool = False) -> None:
        self._put("")

    def _innermost(self) -> "LiveLine | None":
        """The innermost line of work that has taken long enough for a line."""
        due = (line for line in reversed(self._open) if line.format_dict["elapsed"] >= line.delay)
        return next(due, None)

    def _put(self, text: str) -> None:
        if self.in_terminal and self._at_line_start:
            with suppress(OSError):  # a terminal that is gone: SIGHUP says so, and ends the run in order
                self.fp.write(f"\r{text}\x1b[K")
                self.fp.flush()


class Bar(LiveLine):
    """Counts the steps of some work, such as "evaluating 16/50 problems"."""

    def __init__(self, total: int, description: str, unit: str):
        super().__init__(self._parts, total=total, desc=description, unit=unit)

    def _parts(self) -> list[str]:
        left = self.format_dict["elapsed"] / (self.n or 1) * (self.total - self.n)
        return [f"{self.desc} {self.n}/{self.total} {self.unit}", f"{duration(left)} left"][
            : 1 + bool(self.n)
        ]


class _Above(ObjectWrapper):
    """A terminal's stream while there is a live line: its text appears above the line."""

    def write(self, text: str) -> int:
        with LiveLine.external_write_mode(file=self._wrapped):  # clears the line, and draws it afterwards
            LiveLine._at_line_start = text.endswith(("\n", "\r")) if text else LiveLine._at_line_start
            return self._wrapped.write(text)

    def __eq__(self, other: object) -> bool:  # tqdm asks whether a file is sys.stdout or sys.stderr
        return self._wrapped == getattr(other, "_wrapped", other)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line to standard output or `file`. A reader that is gone, or a full disk, must not end a run."""
    with suppress(OSError):
        print(text, file=file, flush=True)


def duration(seconds: float) -> str:
    """A time in the unit that suits it, in few characters."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def fitted(parts: Sequence[str], width: int) -> str:
    """As many of the first parts as fit the width."""
    while len(parts) > 1 and len(SEPARATOR.join(parts)) > width:
        parts = parts[:-1]
    return SEPARATOR.join(parts)[:width]


def escaped(text: str, keep: str = "") -> str:
    """The text with its unprintable characters, which could move the cursor, as \\x1b; but for those in keep."""
    return "".join(c if c.isprintable() or c in keep else f"\\x{ord(c):02x}" for c in text)
