"""train_gspo.py from the command line, in a process of its own or in this one."""

import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from unittest import mock

import train_gspo
from gspo.training.stopping import StopRequest
from support import ROOT

TINY = ["--model_name", "tiny", "--dataset", "sort", "--num_train_samples", "6", "--num_eval_samples", "4",
        "--num_epochs", "1", "--group_size", "4", "--max_new_tokens", "26", "--device", "cpu"]  # fmt: skip


def command(*flags):
    return [sys.executable, str(ROOT / "train_gspo.py"), *map(str, flags)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def run(*flags, cwd=None):
    return subprocess.run(
        command(*flags), capture_output=True, text=True, cwd=cwd, env=environment(), timeout=300
    )


def run_here(*flags):
    """The same in this process, which has imported torch already; signals keep their handlers."""
    out, err = StringIO(), StringIO()
    flags = [*map(str, flags)]
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(StopRequest, "on_signals"):
        try:
            code = train_gspo.main(flags)
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


def forked(work, log):
    """The id of a process that does work() with its output in a file: signals reach it, and it has torch."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = open(log, "a", buffering=1)
            code = work()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return process


def exit_code_of(process):
    """The exit code of a forked process, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_for(condition, process, seconds=120):
    """Wait until a condition holds, or fail if the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and os.waitpid(process, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
