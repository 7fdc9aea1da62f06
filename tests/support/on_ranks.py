"""Call a function of the tests in several processes: `torchrun on_ranks.py MODULE FUNCTION ARGUMENTS ...`."""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from gspo.training.processes import end_processes
from support import ROOT
from support.commands import environment


def on_ranks(count, function, *arguments, timeout=300):
    """Call a function of a module in support/ with text arguments in so many processes."""
    command = [*launcher(count), __file__, function.__module__, function.__name__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables(), timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr


def launcher(count, *flags):
    """The command of torchrun."""
    flags = flags or ("--standalone",)
    return [sys.executable, "-m", "torch.distributed.run", *flags, "--nproc_per_node", str(count)]


def variables():
    return environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "GOMP_SPINCOUNT": "10000"}


# ---- runs of train_gspo.py


def start(folder, *flags, count=2, launch=(), script=ROOT / "train_gspo.py"):
    """So many ranks, in a process group of their own with their launcher; what they say is in folder/log."""
    command = [*launcher(count, *launch), str(script), *map(str, flags)]
    with open(folder / "log", "a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=variables(), cwd=folder, start_new_session=True
        )


def finish(process, folder):
    """The launcher's exit code, and all that was said."""
    code = process.wait(timeout=300)
    return code, (folder / "log").read_text()


def exit_codes(said):
    """The exit codes that the launcher reports; its own is 1. -15 is a process that it ended itself."""
    return set(re.findall(r"exitcode  : (-?\d+)", said))


def ranks_of(process):
    """The ids of the processes that a launcher has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(rank) for rank in found.stdout.split()]


def signal_all(process, number):
    """Send a signal to the launcher, which passes it on, and a SIGKILL to its ranks too: they outlive it."""
    ranks = ranks_of(process)
    os.killpg(process.pid, number)
    if number == signal.SIGKILL:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, number)


def wait_for_line(metrics, count, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    pytest.fail("no rollout batch was trained on")


if __name__ == "__main__":
    module, function, *arguments = sys.argv[1:]
    getattr(importlib.import_module(module), function)(*arguments)
    end_processes()
