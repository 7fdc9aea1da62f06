"""What all parts print with: say() never ends a run, escaped() makes control characters visible."""

from contextlib import suppress
from typing import TextIO

LINE_END = "\n"


def say(text: str, file: TextIO | None = None, end: str = LINE_END) -> None:
    """Print to `file` or standard output. A reader or terminal that is gone or a full disk ends no run."""
    with suppress(OSError):
        print(text, file=file, end=end, flush=True)


def duration(seconds: float) -> str:
    """A time in the unit that suits it, in few characters."""
    longer = f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
    return f"{seconds:.0f} s" if seconds < 100 else longer


def escaped(text: str, keep: str = "") -> str:
    """The text with its unprintable characters, which could move the cursor, as \\x1b, but for `keep`."""
    return "".join(c if c.isprintable() or c in keep else f"\\x{ord(c):02x}" for c in text)


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: of one, or of many (by default with an s)."""
    return f"{number} {one}" if number == 1 else f"{number} {many or one + 's'}"
