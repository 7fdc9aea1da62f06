"""The live line of a terminal, and whole lines in a log file. Needs the standard library alone.

Work that takes long shows how far it is in one line at the bottom of the terminal. Such lines may be nested:
the innermost is shown, and that of the work around it returns afterwards. Whatever else is printed meanwhile,
by print(), a warning or a library, appears above it. Where standard error is no terminal, the state is a line
with a line end every half minute, without control characters.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Self, TextIO

from gspo import PROGRESS_DELAY_S

# Seconds between two states: in a terminal, and in a log file, where each state is a line.
TERMINAL_INTERVAL_S, LOG_INTERVAL_S = 1.0, 30.0
# The width of a terminal that does not tell its own.
USUAL_WIDTH = 80
SEPARATOR = "  "
LINE_END = "\n"


class LiveLine:
    """A line that shows how far some work is.

    A process that a launcher has started shows it only if it is rank 0.

    parts: makes what the line says, the most important first; a narrow terminal shows the first ones.
    stays: the last state stays in the terminal when the work ends, and is in the log.
    """

    def __init__(self, parts: Callable[[], Sequence[str]], stays: bool = False):
        self.parts, self.stays = parts, stays
        self.shown = os.environ.get("RANK", "0") == "0"
        self.started = self.logged_at = time.monotonic()

    def __enter__(self) -> Self:
        if self.shown:
            _screen.open(self)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.shown:
            _screen.close(self)

    def refresh(self) -> None:
        """Show the present state, unless the one on the screen is fresh enough."""
        if self.shown:
            _screen.refresh(self)

    def is_due(self) -> bool:
        """True once the work has taken long enough for a line."""
        return time.monotonic() - self.started >= PROGRESS_DELAY_S


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line while work is in progress; file: by default standard output.

    A pipe whose reader is gone, or a full disk of a log file, must not end a run.
    """
    with suppress(OSError):
        print(text, file=file, flush=True)


class Bar(LiveLine):
    """Counts the steps of some work, such as "evaluating 16/50 problems"."""

    def __init__(self, total: int, description: str, unit: str):
        super().__init__(self._parts)
        self.total, self.description, self.unit = total, description, unit
        self.done = 0

    def update(self, steps: int = 1) -> None:
        self.done += steps
        self.refresh()

    def _parts(self) -> list[str]:
        parts = [f"{self.description} {self.done}/{self.total} {self.unit}"]
        if self.done:
            left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
            parts.append(f"{duration(left)} left")
        return parts


def duration(seconds: float) -> str:
    """A time in the unit that suits it, in few characters."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def fitted(parts: Sequence[str], width: int) -> str:
    """As many of the first parts as fit the width."""
    text = parts[0][:width] if parts else ""
    for part in parts[1:]:
        if len(text) + len(SEPARATOR) + len(part) > width:
            break
        text += SEPARATOR + part
    return text


def escaped(text: str, keep: str = "") -> str:
    """The text with its unprintable characters, which could move the cursor, as \\x1b and so on.

    keep: unprintable characters that stay as they are, such as line ends.
    """
    return "".join(c if c.isprintable() or c in keep else f"\\x{ord(c):02x}" for c in text)


class _Screen:
    """Standard error and the lines of the work in progress, the outermost first."""

    def __init__(self) -> None:
        # A signal's handler may print while a line is drawn, in the same thread.
        self._lock = threading.RLock()
        self._lines: list[LiveLine] = []
        self._in_terminal = False
        self._replaced: list[tuple[str, TextIO, _Above]] = []
        self._drawn = ""
        self._drawn_at = 0.0
        self._at_line_start = True

    def open(self, line: LiveLine) -> None:
        with self._lock:
            if not self._lines:
                self._begin()
            self._lines.append(line)

    def refresh(self, line: LiveLine) -> None:
        with self._lock:
            now = time.monotonic()
            if line is not self._visible():
                return
            if self._in_terminal and now - self._drawn_at >= TERMINAL_INTERVAL_S:
                self._draw()
            # In a log, bars within must not keep the work around them from its own lines.
            since = line.logged_at if line.stays else self._drawn_at
            if not self._in_terminal and now - since >= LOG_INTERVAL_S:
                self._log(line)

    def close(self, line: LiveLine) -> None:
        with self._lock:
            keeps = line.stays and line.is_due() and line is self._visible()
            if keeps and self._in_terminal:
                self._draw()
                self._put(_file(), "\n" if self._drawn else "")
                self._drawn = ""
            elif keeps:
                self._log(line)
            if line in self._lines:
                self._lines.remove(line)
            if self._in_terminal:
                self._draw()
            if not self._lines:
                self._end()

    def _begin(self) -> None:
        self._in_terminal = _is_terminal(sys.stderr)
        self._drawn, self._at_line_start = "", True
        self._drawn_at = time.monotonic()  # in a log, half a minute passes before the first line
        if self._in_terminal:
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if _is_terminal(stream):
                    above = _Above(stream)
                    self._replaced.append((name, stream, above))
                    setattr(sys, name, above)

    def _end(self) -> None:
        for name, stream, above in self._replaced:
            if getattr(sys, name) is above:  # not if someone has replaced it since
                setattr(sys, name, stream)
        self._replaced = []

    def write_above(self, stream: TextIO, text: str) -> int:
        """Write to a terminal's stream, and draw the line again below."""
        with self._lock:
            if self._drawn:
                self._put(stream, "\r\x1b[K")
                self._drawn = ""
            count = stream.write(text)
            stream.flush()
            if text:
                self._at_line_start = text.endswith(("\n", "\r"))
            if self._lines:
                self._draw()
            return count

    def _visible(self) -> LiveLine | None:
        """The innermost line that is due and has something to say."""
        return next((line for line in reversed(self._lines) if line.is_due() and line.parts()), None)

    def _draw(self) -> None:
        if not self._at_line_start:  # text that goes on, such as a bar of a library
            return
        line, file = self._visible(), _file()
        width = _width(file) - 1  # after its last column a terminal may wrap
        text = fitted(line.parts(), width) if line else ""
        if text != self._drawn:
            self._put(file, f"\r{text}\x1b[K")
        self._drawn, self._drawn_at = text, time.monotonic()

    def _log(self, line: LiveLine) -> None:
        say(SEPARATOR.join(line.parts()), sys.stderr)
        self._drawn_at = line.logged_at = time.monotonic()

    def _put(self, file: TextIO, text: str) -> None:
        with suppress(OSError):  # a terminal that is gone: SIGHUP says so, and ends the run in order
            file.write(text)
            file.flush()


class _Above:
    """A terminal's stream while there is a live line: its text appears above the line."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        return _screen.write_above(self.stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _file() -> TextIO:
    """Standard error itself."""
    return sys.stderr.stream if isinstance(sys.stderr, _Above) else sys.stderr


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _width(file: TextIO) -> int:
    with suppress(OSError, ValueError):
        return os.get_terminal_size(file.fileno()).columns or USUAL_WIDTH
    return USUAL_WIDTH


_screen = _Screen()
