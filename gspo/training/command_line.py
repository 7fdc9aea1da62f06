"""How a command ends early: one line on standard error; exit code 2 for a mistake, 130 when interrupted."""

import argparse
import os
import signal
import sys

MAX_MESSAGE = 1000  # characters


class Parser(argparse.ArgumentParser):
    def __init__(self, description: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False)

    def error(self, message):
        """One line, without the usage that argparse puts before it."""
        complain(self.prog, f"{message}; see --help")
        sys.exit(2)


def complain(program: str, message: object) -> None:
    """One line on standard error, whatever text of a model or a file the message quotes: nothing in it moves
    the cursor, and it ends somewhere. Of several processes, all but the first say which they are."""
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(message))
    text = text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ..."
    rank = os.environ.get("RANK", "0")
    speaker = program if rank == "0" else f"{program} (process {rank})"
    print(f"{speaker}: {text}", file=sys.stderr)


def prepare_process() -> None:
    """Settings of the process that torch reads when it is imported: call this first."""
    # OpenMP threads that wait for work spin for long before they sleep. On a CPU that other processes share,
    # that made a rollout batch up to five times slower; spinning briefly costs little (LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def interruptible() -> None:
    """SIGINT and SIGTERM end the program at once, with one line and exit code 130."""

    def stop(*_):
        complain(os.path.basename(sys.argv[0]), "interrupted before training began")
        os._exit(130)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
