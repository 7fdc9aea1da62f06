"""The contestants of a benchmark. Each has its own environment and process, and they take turns."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
# These settings make glibc keep freed memory, as gspo/policy/cpu.py does for this toolkit.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def environment_of(peer: str, packages: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    """Return the Python of a peer's environment, benchmarks/.peers/PEER, and make it if it is missing."""
    folder = FOLDER / ".peers" / peer
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder} with {', '.join(packages)}", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        if unwanted:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted], check=True)
    return python


def model_folder() -> str:
    """Return the folder of the embedded model, from which all contestants load it."""
    code = (
        "from gspo.policy.model_cache import EMBEDDED_NAME, converted_folder\n"
        "from gspo.policy.model_loader import load_model\n"
        "load_model(EMBEDDED_NAME)\n"
        "print(converted_folder())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parent, check=True, stdout=subprocess.PIPE
    )
    return printed.stdout.decode().split()[-1]


class Worker:
    """A contestant in its own process, which executes one rollout batch per turn (workloads.py)."""

    def __init__(self, command: Sequence[str | Path], threads: int, **variables: str) -> None:
        environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(threads), **variables}
        self.process = subprocess.Popen(
            command, cwd=FOLDER, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        while self._line() != "ready":
            pass

    def turn(self) -> dict:
        """Let the contestant execute one rollout batch, and return what it measured."""
        print("go", file=self.process.stdin, flush=True)
        while not (line := self._line()).startswith("{"):
            pass
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with exit code {self.process.wait()}")
        return line.strip()


def alternate(workers: dict[str, Worker], turns: int) -> dict[str, list[dict]]:
    """Let the workers take turns, and return what each measured, without its first turn, which warms up."""
    answers: dict[str, list[dict]] = {who: [] for who in workers}
    for _ in range(turns):
        for who, worker in workers.items():
            answers[who].append(worker.turn())
    for worker in workers.values():
        worker.close()
    return {who: measured[1:] for who, measured in answers.items()}
