"""Run small JSON jobs in worker processes that can be killed.

Code that grades untrusted text may never return (9^9^9^9), eat the memory or take the interpreter down, and a
timeout inside the process does not help: a loop in C ignores it. So each job runs in a worker, and the parent
kills the worker's process group when the deadline passes. The parent's side is `WorkerPool`, the worker's
side is `serve`. They exchange JSON values over pipes, one per line, without pickle or multiprocessing. So a
pool works from any `__main__`, from notebooks, from threads and beside torch.

Protocol: the worker writes "ready" when its imports are done, then {"job": number, "result": ...} or {"job":
number, "error": text} for each line [number, job] that it reads, and ends when its stdin does.
"""

import atexit
import contextlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import gspo

START_TIMEOUT_S = 120.0  # a fresh worker imports sympy: 2 s warm, much longer from a cold or network disk
MAX_FAILED_STARTS = 3  # in a row: then the command itself is wrong, and starting it again would loop forever
PACKAGE_PARENT = str(Path(gspo.__file__).parents[1])
# Why a job has no result, in WorkerPool.lost.
TIMED_OUT, DIED = "it took too long", "it ended its process"
POLL_S = 0.2  # between looks at whether workers live
JOB_ALARM_S = 120  # a worker whose parent was killed in the middle of a job ends itself


class WorkerPool:
    """Worker processes that stay up between calls.

    command: argument list of a program that calls `serve`, such as python -m gspo.tasks.grading.
    num_workers: how many run at most; they are started when there are jobs for them.
    timeout_s: seconds one job may take. The start of a worker is not counted.
    lost: why jobs of the last map() have no result, by their places.
    """

    def __init__(self, command: list[str], num_workers: int, timeout_s: float):
        self.command, self.num_workers, self.timeout_s = command, num_workers, timeout_s
        self.lost: dict[int, str] = {}
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()
        atexit.register(self.close)

    def map(self, jobs: list, description: str = "jobs") -> list:
        """The jobs' results, in order. None for a job that hung, that raised, or whose worker died twice.

        jobs: JSON values. RuntimeError: the workers do not start.
        """
        from gspo.live_line import Bar  # here, since --help imports this module and needs no tqdm

        results: list = [None] * len(jobs)
        self.lost = {}
        waiting = deque(range(len(jobs)))
        deaths: Counter[int] = Counter()  # job -> workers that died at it
        unfinished, failed_starts = len(jobs), 0
        progress = Bar(len(jobs), description, "done")
        with self._lock, progress, self._no_job_left_behind():
            while unfinished:
                while len(self._workers) < min(self.num_workers, unfinished):
                    self._workers.append(_Worker(self.command))
                for worker in self._workers:
                    if worker.job is None and waiting:
                        worker.assign(waiting.popleft(), jobs, self.timeout_s)
                busy = [worker for worker in self._workers if worker.job is not None]
                _exchange(busy)
                for worker in busy:
                    assert worker.job is not None
                    if worker.take_ready(self.timeout_s):
                        failed_starts = 0
                    reply = worker.take_reply()
                    if reply is not None:
                        if "error" in reply:
                            warnings.warn(f"a job was not judged: {reply['error']}", stacklevel=2)
                            self.lost[worker.job] = reply["error"]
                        results[worker.job] = reply.get("result")
                        worker.job = None
                        unfinished -= 1
                    elif worker.has_died() or worker.deadline < time.monotonic():
                        died = worker.ready and worker.has_died()
                        self._dismiss(worker)
                        failed_starts += not worker.ready
                        deaths[worker.job] += died
                        # A worker that does not start, or is killed by accident, says nothing of its job.
                        if not worker.ready or (died and deaths[worker.job] == 1):
                            waiting.appendleft(worker.job)
                        else:
                            self.lost[worker.job] = DIED if died else TIMED_OUT
                            unfinished -= 1
                if failed_starts >= MAX_FAILED_STARTS:
                    raise RuntimeError(f"worker processes do not start: {' '.join(self.command)}")
                progress.update(len(jobs) - unfinished - progress.n)
        return results

    def close(self) -> None:
        """Kill the workers. The pool can be used again afterwards."""
        if os.getpid() == self._owner:  # a forked child exits too, and the workers are not its own
            for worker in list(self._workers):
                self._dismiss(worker)

    def _dismiss(self, worker: "_Worker") -> None:
        worker.kill()
        self._workers.remove(worker)

    @contextlib.contextmanager
    def _no_job_left_behind(self) -> Iterator[None]:
        """Kill workers that are still at a job, as after Ctrl-C: their result would answer the next call."""
        try:
            yield
        finally:
            for worker in [worker for worker in self._workers if worker.job is not None]:
                self._dismiss(worker)


class _Worker:
    """The parent's side of one worker process: its pipes, and what is on its way through them."""

    def __init__(self, command: list[str]):
        # One BLAS thread: each reserves address space, which counts against the worker's memory limit.
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        # The worker imports this package from where its parent did.
        search_path = os.pathsep.join([PACKAGE_PARENT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        environment = os.environ | one_thread | {"PYTHONPATH": search_path}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
            env=environment,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.stdin: IO[bytes] = self.process.stdin
        self.stdout: IO[bytes] = self.process.stdout
        os.set_blocking(self.stdin.fileno(), False)
        self.inbox, self.outbox = b"", b""
        self.job: int | None = None
        self.ready = self.closed = False
        self.deadline = time.monotonic() + START_TIMEOUT_S

    def assign(self, job: int, jobs: list, timeout_s: float) -> None:
        self.job = job
        self.outbox += json.dumps([job, jobs[job]]).encode() + b"\n"
        if self.ready:
            self.deadline = time.monotonic() + timeout_s

    def send(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # the worker is gone: reading finds that out
            self.outbox = self.outbox[os.write(self.stdin.fileno(), self.outbox) :]

    def receive(self) -> None:
        chunk = os.read(self.stdout.fileno(), 1 << 16)
        self.inbox += chunk
        self.closed = not chunk

    def take_ready(self, timeout_s: float) -> bool:
        """True once, when the worker says that it is up; its job's time starts to run."""
        if self.ready or not self.inbox.startswith(b'"ready"\n'):
            return False
        self.inbox = self.inbox[len(b'"ready"\n') :]
        self.ready, self.deadline = True, time.monotonic() + timeout_s
        return True

    def take_reply(self) -> dict | None:
        """The reply to the job, if it is there. A line that is none, which a job wrote, closes the worker."""
        if not (self.ready and b"\n" in self.inbox):
            return None
        line, self.inbox = self.inbox.split(b"\n", 1)
        with contextlib.suppress(ValueError, RecursionError):
            reply = json.loads(line)
            if isinstance(reply, dict) and reply.get("job") == self.job:
                return reply
        self.closed = True
        return None

    def has_died(self) -> bool:
        """True if the process is gone, with nothing more to read. A child of it may hold the pipe open."""
        return self.closed or (self.process.poll() is not None and not _is_readable(self.stdout))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.stdin.close()
        self.stdout.close()
        self.process.wait()


def _exchange(workers: list[_Worker]) -> None:
    """Wait until a pipe can be read or written, for the first deadline or POLL_S, then read and write."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.stdout, selectors.EVENT_READ, worker.receive)
            if worker.outbox:
                selector.register(worker.stdin, selectors.EVENT_WRITE, worker.send)
        remaining = min(worker.deadline for worker in workers) - time.monotonic()
        for key, _ in selector.select(min(max(0.0, remaining), POLL_S)):
            key.data()


def _is_readable(pipe: IO[bytes]) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        return bool(selector.select(0))


def serve(make_handle: Callable[[], Callable[[Any], Any]], memory_gb: float = 2.0) -> None:
    """The worker's side: answer each JSON job on stdin with handle(job), until stdin ends.

    make_handle() returns handle; its time is not that of a job. What either of them prints goes nowhere, what
    they read is empty, and more than memory_gb of address space is a MemoryError, but on macOS.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # only this loop writes to the parent
    jobs = os.fdopen(os.dup(sys.stdin.fileno()))  # and only it reads what the parent writes
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(memory_gb * 2**30)
    soft = min(limit, hard) if hard != resource.RLIM_INFINITY else limit
    with contextlib.suppress(ValueError, OSError):  # macOS refuses this limit: go on without it
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # by default the kernel ends the process, also in code in C
    own_process, handle = os.getpid(), make_handle()
    print(json.dumps("ready"), file=replies, flush=True)
    for line in jobs:
        signal.alarm(JOB_ALARM_S)
        number, job = json.loads(line)
        try:
            reply = {"job": number, "result": handle(job)}
        except Exception as error:
            reply = {"job": number, "error": f"{type(error).__name__}: {error}"[:500]}
        signal.alarm(0)
        if os.getpid() != own_process:  # a job has forked, and this is the copy
            os._exit(0)
        print(json.dumps(reply), file=replies, flush=True)
