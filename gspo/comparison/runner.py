"""Make the runs of a comparison, one after another or side by side, each in a process of its own."""

import ctypes
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gspo.comparison.cells import Cell, is_complete, make_room, record_of
from gspo.live_line import Bar
from gspo.training.command_line import on_stop_signals

TRAIN = Path(__file__).resolve().parents[2] / "train_gspo.py"
POLL_S = 0.2
# Exit codes of train_gspo.py.
BAD_INPUT, INTERRUPTED = 2, 130
LOCK = ".lock"
CHANGED = "{}, seed {}: a file that it depends on has changed since the comparison began; start it again"
TRACEBACK = "Traceback (most recent call last)"
# The last line of a traceback, before which torch may name the process.
ERROR = re.compile(r"^(\[rank\d+\]: ?)?(?P<error>[\w.]*(Error|Exception): .+)", re.MULTILINE)
PR_SET_PDEATHSIG = 1  # prctl(2)


class Interrupted(Exception):
    """The comparison was asked to stop. Its runs have saved their state."""


class Runner:
    """Makes runs, `jobs` at a time.

    Args:
        launch: the command in the place of "python", such as "torchrun --nproc_per_node 4".
        gpus: the names that CUDA_VISIBLE_DEVICES may have. Runs side by side get equal parts of them, of at
            least one.
        tell: called with each run that is complete.
        discard_models: keep the records of complete runs without the weights.
    """

    def __init__(
        self,
        jobs: int,
        launch: str = "",
        gpus: Sequence[str] = (),
        tell: Callable[[Cell], None] = print,
        discard_models: bool = False,
    ):
        self.jobs, self.gpus, self.tell, self.discard_models = jobs, gpus, tell, discard_models
        self.launch = shlex.split(launch) or [sys.executable]
        self.running: dict[int, tuple[Cell, subprocess.Popen]] = {}
        self.resumed: set[Cell] = set()
        self.checked: set[Cell] = set()
        self.logged: dict[Cell, int] = {}  # bytes in the log before the run was started
        self.stopped = False

    def run(self, cells: Sequence[Cell]) -> dict[Cell, str]:
        """Make the runs that are not complete.

        Returns:
            The runs that failed, and why: their last line. An emergency stop is a result and no failure.

        Raises:
            ValueError: train_gspo.py refuses the input, or a file has changed since the comparison began, and
                all runs have been stopped; or another comparison is at work in the folder of the runs.
            Interrupted: a signal has come.
        """
        with _locked(cells[0].folder.parent):
            waiting = deque(cell for cell in cells if not self._is_there(cell))
            failed: dict[Cell, str] = {}
            with _stopped_by_signals(self._stop), Bar(len(waiting), "comparing", "runs") as bar:
                while (waiting and not self.stopped) or self.running:
                    self._start(waiting)
                    time.sleep(POLL_S)
                    bar.update(0)
                    self._check_files()
                    for cell, code in self._ended():
                        if code == BAD_INPUT and cell not in self.resumed:
                            self._end_all()
                            raise ValueError(self._last_line(cell))
                        if self._is_there(cell):
                            self.tell(cell)
                            bar.update(1)
                        elif code != INTERRUPTED or not self.stopped:
                            failed[cell] = self._why(cell, code)
            if self.stopped:
                raise Interrupted
            return failed

    def _is_there(self, cell: Cell) -> bool:
        """True if the run is complete, whose checkpoints are then deleted."""
        run = record_of(cell)
        if not is_complete(cell, run):
            return False
        make_room(cell, run, self.discard_models)
        return True

    def _start(self, waiting: deque[Cell]) -> None:
        """Fill the free places."""
        for place in range(self.jobs):
            if place in self.running or not waiting or self.stopped:
                continue
            cell = waiting.popleft()
            run = record_of(cell)
            if run and run.going:  # of a comparison that was killed; it is about to end
                waiting.append(cell)
                return
            if not cell.is_named_right:
                self._end_all()
                raise ValueError(CHANGED.format(cell.arm, cell.seed))
            make_room(cell, run)
            if run:
                self.resumed.add(cell)
            self.running[place] = (cell, self._process(cell, place))
            if self.stopped:  # a signal came before the process was known
                self._stop()

    def _process(self, cell: Cell, place: int) -> subprocess.Popen:
        is_new = cell not in self.resumed
        where = ["--run_name", cell.folder.name] if is_new else ["--resume", str(cell.folder)]
        command = [*self.launch, str(TRAIN), *cell.flags, "--output_dir", str(cell.folder.parent), *where]
        environment = dict(os.environ)
        if self.jobs > 1:
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        if self.jobs > 1 and self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus_of(place))
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        with cell.log.open("ab") as log:
            self.logged[cell] = log.tell()
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip

    def _gpus_of(self, place: int) -> list[str]:
        """A part of the GPUs for each of the places; a GPU has several of them if there are more."""
        share = len(self.gpus) // self.jobs
        if share == 0:
            return [self.gpus[place % len(self.gpus)]]
        return list(self.gpus[place * share : (place + 1) * share])

    def _ended(self) -> list[tuple[Cell, int]]:
        """The runs whose processes have ended, and their exit codes."""
        over = [
            (cell, process.returncode)
            for cell, process in self.running.values()
            if process.poll() is not None
        ]
        self.running = {place: going for place, going in self.running.items() if going[1].returncode is None}
        return [(cell, code) for cell, code in over]

    def _stop(self, *_: Any) -> None:
        """Ask the runs that are going to save their state and end."""
        self.stopped = True
        for _cell, process in self.running.values():
            process.send_signal(signal.SIGTERM)

    def _why(self, cell: Cell, code: int) -> str:
        """Why a run has failed."""
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}" + (", as the system does if memory runs out" if code == -9 else "")
        return self._last_line(cell) or f"ended with exit code {code}"

    def _last_line(self, cell: Cell) -> str:
        return last_line(cell.log, self.logged[cell])

    def _check_files(self) -> None:
        """Check the files of the new runs that have read them, and delete a run that may have read others."""
        for cell, _process in self.running.values():
            if cell in self.checked or cell in self.resumed or not (cell.folder / "config.json").exists():
                continue
            self.checked.add(cell)
            if not cell.is_named_right:
                self._end_all()
                shutil.rmtree(cell.folder)
                raise ValueError(CHANGED.format(cell.arm, cell.seed))

    def _end_all(self) -> None:
        """Stop the runs that are going, and wait for them."""
        self._stop()
        for _cell, process in self.running.values():
            process.wait()


@contextmanager
def _stopped_by_signals(stop: Callable[..., None]) -> Iterator[None]:
    """Call stop() on the signals that end a program, while runs are made."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    on_stop_signals(stop)
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other comparisons from making the same runs; a kill releases the lock. Raises ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another comparison is at work in {folder}: wait for it, or give another --output_dir"
            ) from None
        yield


def last_line(log: Path, begin: int = 0) -> str:
    """Return why a run ended: its complaint, else the error of its traceback, else the last line it printed.

    begin: where the run's output begins in the log, in bytes. A launcher prints last, a traceback of its own
    without a message and a box of "=", which are passed over.
    """
    try:
        text = log.read_bytes()[begin:].decode(errors="replace")
    except OSError:
        return ""
    said = [line.strip() for line in text.split("\n") if re.search(r"\w", line)]
    complaints = [line for line in said if line.startswith(f"{TRAIN.name}:")]
    errors = [found["error"] for found in ERROR.finditer(text.partition(TRACEBACK)[2])]
    return ([""] + said[-1:] + errors[-1:] + complaints[-1:])[-1]


def end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the parent ends, even if it is killed. To be called in the child."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
