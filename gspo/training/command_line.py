"""How a command starts and how it ends early. Does not import torch.

A mistake is one line on standard error and exit code 2; an interrupt is exit code 130.
"""

import argparse
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from gspo.printing import LINE_END, escaped

MAX_MESSAGE = 1000  # characters


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error message is one line, without the usage.

    @FILE among the arguments stands for the flags in a file, in which # begins a comment.
    """

    def __init__(self, description: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(
            description=description, formatter_class=raw, allow_abbrev=False, fromfile_prefix_chars="@"
        )

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)

    def error(self, message: str) -> NoReturn:
        complain(self.prog, f"{message}; see --help")
        sys.exit(2)


def complain(program: str, message: object) -> None:
    """Print one line on standard error; all ranks but 0 say which they are.

    The message may quote text of a model or a file. Characters that could move the cursor are escaped, and a
    long message is cut.
    """
    text = escaped(str(message))
    if len(text) > MAX_MESSAGE:
        text = f"{text[:MAX_MESSAGE]} ..."
    rank = os.environ.get("RANK", "0")
    speaker = program if rank == "0" else f"{program} (process {rank})"
    print(f"{speaker}: {text}", file=sys.stderr)


def is_rank_0() -> bool:
    """True in the process that prints. A launcher numbers its processes in RANK."""
    return os.environ.get("RANK", "0") == "0"


def plain_warnings() -> None:
    """Print warnings as one line each, without the place in the code that they come from."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {escaped(str(message), keep=LINE_END)}", file=sys.stderr)

    warnings.showwarning = show  # type: ignore[assignment]


def interruptible() -> None:
    """Let SIGINT, SIGTERM and SIGHUP end the program at once, with one line and exit code 130."""

    def stop(*_: Any) -> None:
        complain(os.path.basename(sys.argv[0]), "interrupted before training began")
        os._exit(130)

    on_stop_signals(stop)


def on_stop_signals(stop: Callable[..., None]) -> None:
    """Call stop() on SIGINT, SIGTERM and SIGHUP.

    SIGHUP says that the terminal is gone, as when an ssh connection is lost, and with it what this program
    was piped into. Writing there would raise OSError, perhaps in the middle of an update, so from then on,
    only files are written to. nohup starts the program with SIGHUP ignored, and it stays so.
    """

    def hang_up(*_: Any) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            if not os.path.isfile(descriptor):
                os.dup2(nowhere, descriptor)
        stop()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, hang_up)
