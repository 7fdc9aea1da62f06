"""Run a command, and end it and all that it started when standard input closes or the parent ends.

    python vllm_guard.py FOLDER COMMAND ...          FOLDER, if it is there, is removed at the end

The parent closes standard input when it has no more use for the command. However it ends, kill -9 included,
nothing of the command is left behind. The pipe alone would not tell: other children of the parent may hold it
open. This script needs the standard library alone, and nothing of the toolkit.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

# Seconds for an orderly end.
PATIENCE_S = 10.0
# Seconds between two looks whether the parent is still there.
LOOK_S = 0.5


def main() -> int:
    parent = os.getppid()
    # A session of its own: a signal reaches all of the command's processes, and the terminal's reach none.
    command = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, start_new_session=True)

    def end(*_: object) -> None:
        kill(command, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            command.wait(PATIENCE_S)
        kill(command, signal.SIGKILL)

    def end_with_the_pipe() -> None:
        while os.read(0, 1024):
            pass
        end()

    def end_with_the_parent() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        end()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    for watch in (end_with_the_pipe, end_with_the_parent):
        threading.Thread(target=watch, daemon=True).start()
    code = command.wait()
    kill(command, signal.SIGKILL)  # what it may have left of itself
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    return code if code >= 0 else 128 - code  # of a signal, as a shell has it


def kill(command: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of processes that have ended
        os.killpg(command.pid, number)


if __name__ == "__main__":
    sys.exit(main())
