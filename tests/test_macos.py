"""What works on macOS, as far as Linux can pretend to be it: what macOS lacks is taken away or made to fail.

Only the toolkit is told that this is macOS: Python's library and torch would look for files of theirs.
"""

import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from gspo.training.processes import Processes
from support import ROOT
from support.commands import TINY, environment, run_here
from train_gspo import parse, resolve_for_machine

# Run first in each process, the workers that grade answers included.
MACOS = """
import ctypes, fcntl, os, platform, resource, select, signal, socket, sys
def told_to_the_toolkit(answer, usual):
    return lambda: answer if sys._getframe(1).f_globals["__name__"].startswith("gspo.") else usual()
platform.system = told_to_the_toolkit("Darwin", platform.system)
platform.machine = told_to_the_toolkit("arm64", platform.machine)
for module, names in {
    os: ["sched_getaffinity", "sched_setaffinity", "unshare", "setns", "memfd_create", "eventfd",
         "pidfd_open", "pipe2", "O_TMPFILE", "O_PATH", "splice", "getrandom"],
    resource: ["prlimit", "RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_RTPRIO", "RLIMIT_SIGPENDING"],
    signal: ["pidfd_send_signal", "sigtimedwait", "sigwaitinfo"],
    select: ["epoll"],
    socket: ["SOCK_CLOEXEC", "SO_PASSCRED", "SO_PEERCRED", "MSG_CMSG_CLOEXEC"],
}.items():
    exported = getattr(module, "__all__", [])
    for name in names:
        vars(module).pop(name, None)
        if name in exported:
            exported.remove(name)

set_limit = resource.setrlimit
def refuse_address_space(which, limits):
    if which == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    set_limit(which, limits)
resource.setrlimit = refuse_address_space

class LibC(ctypes.CDLL):
    def __getattr__(self, name):
        if name in ("mallopt", "prctl"):
            raise AttributeError(name)
        return super().__getattr__(name)
ctypes.CDLL = LibC
"""


@pytest.fixture
def on_macos(tmp_path):
    """Return a function that runs a script, or code, in a process that takes itself for macOS."""
    (tmp_path / "sitecustomize.py").write_text(MACOS)

    def run(*arguments):
        paths = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment() | paths, timeout=300
        )

    return run


@pytest.mark.slow
def test_training_works(on_macos, tmp_path):
    done = on_macos(
        ROOT / "train_gspo.py", *TINY, "--dataset", "math", "--run_name", "r", "--max_new_tokens", 8
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gspo_outputs" / "r" / "final_model" / "model.safetensors").exists()


@pytest.mark.slow
def test_code_problems_are_refused_in_one_line_that_names_what_to_do(on_macos):
    done = on_macos(ROOT / "train_gspo.py", *TINY, "--dataset", "mixed")
    assert done.returncode == 2
    assert done.stderr == (
        "train_gspo.py: code problems cannot be judged here: the code sandbox needs Linux on x86-64 or "
        "aarch64, and this is Darwin on arm64: use a virtual machine or a container there. --dataset math "
        "and reasoning need no sandbox\n"
    )


def test_the_commands_start(on_macos):
    for script in ("train_gspo.py", "validate_gspo.py", "setup.py"):
        done = on_macos(ROOT / script, "--help")
        assert done.returncode == 0, done.stderr
    done = on_macos("-c", "import setup; setup.print_hardware()")
    assert done.returncode == 0 and done.stdout.startswith("Hardware: "), done.stderr


@pytest.mark.slow
def test_rewards_are_as_expected_without_the_sandbox(on_macos):
    done = on_macos(ROOT / "data_loader.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Without code problems: " in done.stdout and " as expected" in done.stdout


def test_an_apple_gpu_is_not_used_and_the_run_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    config = resolve_for_machine(parse([*TINY[:-2]]))
    assert config.device == "cpu"
    assert "device: cpu (Apple GPUs are not supported)" in capsys.readouterr().out
    assert Processes("cpu").device.type == "cpu"


def test_asking_for_an_apple_gpu_is_refused_in_one_line():
    done = run_here(*TINY, "--device", "mps")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--device: invalid choice: 'mps' (choose from " in done.stderr


def test_a_device_that_accelerate_chooses_by_itself_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    for state in (AcceleratorState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})
    with pytest.raises(ValueError, match="chosen the device meta, but the run was to use cpu"):
        Processes("cpu")
