"""Run a command, and end it with everything that it has started when standard input closes.

    python vllm_guard.py COMMAND ...

The other end of standard input is held by the process that wants the command to live. However that process
ends, kill -9 included, the pipe closes, and nothing of the command is left behind. This script needs the
standard library alone, and nothing of the toolkit.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

# Seconds for an orderly end.
PATIENCE_S = 10.0


def main() -> int:
    # A session of its own: a signal reaches all of the command's processes, and the terminal's reach none.
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def end(*_: object) -> None:
        kill(command, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            command.wait(PATIENCE_S)
        kill(command, signal.SIGKILL)

    def end_with_the_pipe() -> None:
        while os.read(0, 1024):
            pass
        end()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    threading.Thread(target=end_with_the_pipe, daemon=True).start()
    code = command.wait()
    kill(command, signal.SIGKILL)  # what it may have left of itself
    return code if code >= 0 else 128 - code  # of a signal, as a shell has it


def kill(command: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of processes that have ended
        os.killpg(command.pid, number)


if __name__ == "__main__":
    sys.exit(main())
