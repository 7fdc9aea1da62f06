"""Run untrusted Python against tests: a verdict that cannot be forged, on a machine that is not touched.

    python -m gspo.sandbox      what protects this machine, and what a program that tries to get out is told

`run_tests(code, tests)` is the whole interface. A policy under reinforcement learning finds every hole in its
reward, so these hold:

The verdict. No test and no expected value enters the process that runs the solution, or a process whose
memory that one inherits. Arguments and results travel as plain data (plain_data.py), and this module compares
their texts, types and all. Asserts run in a second process, for which the solution is a function that answers
with plain data or an exception. So objects that equal everything, patched built-ins, frames, the garbage
collector, atexit, exit codes and markers on descriptors prove nothing: only the right answers do. A reply
that nobody asked for ends the job.

The machine. Each process is forked from a warm interpreter (zygote.py) that has no rights left
(isolation.py), and ends with its job:

| layer      | what it does                                                                          |
|------------|---------------------------------------------------------------------------------------|
| seccomp    | an allow-list of system calls: no process, socket, signal, writing, machine code       |
| namespaces | a file system with the standard library alone; no network; no other processes         |
| landlock   | nothing but the standard library can be opened, and only to read                       |
| limits     | memory, threads, descriptors, output, size of a result; time, by killing from outside |
| user       | one of its own, if the caller is root; no capabilities, privileges or environment      |

Seccomp and one of namespaces and landlock are required; without them, and on other systems than Linux,
SandboxError says what is missing. There is no weaker mode. After a failure of the sandbox itself the job is
run once more, then it is a SandboxError; it is never a verdict.

Not covered: faults of the kernel; side channels such as timing; the processor time of 32 threads until the
deadline; memory that the kernel holds for a process, page tables above all, up to about as much again as
memory_mb. Where landlock works alone, stat() and readlink() tell which files exist; and if the caller is not
root there (or is root of a user namespace with few ids), the kernel counts threads for the caller's user as a
whole: a job starts none while that user has 1,024, so a job that takes them all leaves none to other jobs.

Programs have no file to write, no sub-processes, no shared memory, no network, no third-party packages, and
32 threads at most, those of a job's two processes together.
"""

import atexit
import contextlib
import fcntl
import functools
import json
import math
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path

from gspo.sandbox import plain_data

MAX_OUTPUT_BYTES = 2**20  # printed by one process
MAX_TIMEOUT_S, MAX_MEMORY_MB = 86400.0, 2**20
MAX_REPLY_BYTES = 4 * 2**20  # one result, beyond the length of the right one where that is known
MAX_TESTS_BYTES = 64 * 2**20  # one line of the asserts' process, which may hold their own large arguments
MAX_ERROR_CHARS = 50_000  # of an exception; honest ones take half of it, and parsing takes 25 bytes for each
START_TIMEOUT_S = 60.0  # of the interpreter, from a cold disk
CONTROL_TIMEOUT_S = 20.0  # a fork or a kill takes milliseconds, on an overloaded machine longer
EXIT_GRACE_S = 0.5  # between a process's last word and its end
ATTEMPTS = 2  # before a failure of the sandbox itself is reported
DETAIL_CHARS = 300
# Of the interpreter: the same code has the same result, and a thread does not reserve 64 MB of address space.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
LAYERS = ("namespaces", "landlock")  # what to try; fewer only in tests


class SandboxError(RuntimeError):
    """The sandbox itself does not work, on this machine or this time: no verdict on the code."""


@dataclass(frozen=True)
class TestResult:
    """passed: of total tests. status: pass if all did, else that of the first which did not: fail, error,
    timeout, memory, crash or output_limit. detail: a line for the reader, which may quote the code's words.
    """

    __test__ = False  # for pytest: no class of tests

    passed: int
    total: int
    status: str
    detail: str = ""


def run_tests(code: str, tests: dict, timeout_s: float = 5.0, memory_mb: int = 512) -> TestResult:
    r"""Run untrusted code against tests, which have one of three forms:

        {"entry_point": "f", "calls": [{"args": [...], "expected": ...}, ...]}
        {"entry_point": "f", "asserts": "assert f(3) == 14\nassert ..."}
        {"stdio": [{"stdin": "3\n", "stdout": "14\n"}, ...]}

    calls: results are compared strictly, False is not 0; "kwargs" may stand beside "args". asserts: each
    assert at the top level, and each call of a function that they define, such as check(f), is a test. stdio:
    the code runs once for each test, and its whole output is compared, white space at the ends of lines and
    at the end aside.

    What asserts cannot have, since f runs in another process: an f that changes its arguments in place (it
    has copies); arguments that are no plain data, such as iterators, functions, Decimals and instances (a
    ValueError, once they are passed); results of such kinds (an error of the code); a class in place of f.

    timeout_s: wall-clock time for all tests together. memory_mb: address space of each process, beside what
    the interpreter itself takes. ValueError: malformed tests or limits. SandboxError: no verdict.
    """
    if not (isinstance(code, str) and 0 < timeout_s < MAX_TIMEOUT_S and 0 < memory_mb < MAX_MEMORY_MB):
        raise ValueError(f"code must be a string, timeout_s {timeout_s} and memory_mb {memory_mb} positive")
    code, memory_mb, job = code.removeprefix("\ufeff"), math.ceil(memory_mb), _job_of(tests)
    try:
        return _attempt(lambda sandbox: _tally(job(sandbox, code, timeout_s, memory_mb)))
    except SandboxError as error:
        if not isinstance(error.__cause__, _Killed):
            raise
        return TestResult(0, 1, "memory", "killed by the kernel: the machine is out of memory")


def check_machine() -> dict[str, str]:
    """What protects this machine: layer or forbidden act -> how it is. SandboxError: not enough."""
    return _attempt(lambda sandbox: sandbox.layers | sandbox.probe())


class _Ended(Exception):
    """A process that runs the code came to an end that the tests did not ask for. args: status, detail."""


class _Broken(Exception):
    """The sandbox itself failed."""


class _Killed(_Broken):
    """A process was killed from outside, most likely by the kernel for want of memory."""


# The three forms of tests. A job is a generator of the number of tests, then of each one's (status, detail).
# It may end early with _Ended, for the tests that are left.


def _job_of(tests: dict) -> Callable:
    forms = {"calls": _calls_job, "asserts": _asserts_job, "stdio": _stdio_job}
    given = [form for form in forms if isinstance(tests, dict) and form in tests]
    if len(given) != 1:
        raise ValueError(f"tests must be a dictionary with one of the keys {', '.join(forms)}")
    name = tests.get("entry_point")
    if given != ["stdio"] and not (isinstance(name, str) and name.isidentifier() and not iskeyword(name)):
        raise ValueError(f"entry_point must be the name of a function, not {name!r}")
    return forms[given[0]](name, tests[given[0]])


def _calls_job(name: str, calls: list[dict]) -> Callable:
    try:
        requests = [plain_data.encode(_arguments(call)) for call in calls]
        expected = [plain_data.comparable(call["expected"]) for call in calls]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"each of calls needs args and expected, both of plain data ({error!r})") from error
    if not requests:
        raise ValueError("there are no calls to test")

    def run(sandbox: _Sandbox, code: str, timeout_s: float, memory_mb: int) -> Iterator:
        yield len(requests)
        with sandbox.processes(1, memory_mb) as (solution,):
            deadline = time.monotonic() + timeout_s
            _load_solution(solution, [code, name, "comparable"], deadline)
            for request, right in zip(requests, expected, strict=True):
                reply = solution.ask(request, deadline, MAX_REPLY_BYTES + len(right))
                if reply[:1] == "R":
                    yield ("pass", "") if reply[1:] == right else ("fail", f"{name} returned {reply[1:]}")
                else:
                    yield _raised(reply)

    return run


def _arguments(call: dict) -> tuple[list, dict]:
    args, kwargs = call["args"], call.get("kwargs", {})
    if (
        not isinstance(args, list | tuple)
        or not isinstance(kwargs, dict)
        or not all(map(str.isidentifier, kwargs))
    ):
        raise TypeError("args must be a list, and kwargs a dictionary of names")
    return list(args), kwargs


def _asserts_job(name: str, asserts: str) -> Callable:
    if not isinstance(asserts, str):
        raise ValueError("asserts must be a string of Python statements")

    def run(sandbox: _Sandbox, code: str, timeout_s: float, memory_mb: int) -> Iterator:
        with sandbox.processes(2, memory_mb) as (solution, tests):
            ask_tests = functools.partial(tests.ask, max_bytes=MAX_TESTS_BYTES)
            try:
                order = json.dumps(["tests", asserts, name])
                count = ask_tests(order, time.monotonic() + CONTROL_TIMEOUT_S)
            except _Ended as ended:
                status, detail = ended.args
                raise (_Broken if status == "timeout" else ValueError)(
                    f"reading the asserts: {detail}"
                ) from None
            if count[:1] != "N" or count == "N0":
                raise ValueError(f"asserts are no tests: {_raised(count)[1] if count[:1] == 'X' else 'none'}")
            deadline = time.monotonic() + timeout_s
            yield int(count[1:])
            _load_solution(solution, [code, name, "encode"], deadline)
            word = ask_tests("go on", deadline)
            while word != "D":
                if word[:1] == "C":
                    word = ask_tests(solution.ask(word[1:], deadline), deadline)
                    continue
                if word[:1] == "X":
                    raise ValueError(f"asserts call {name} with what is no plain data: {_raised(word)[1]}")
                if word[:1] == "Q":
                    raise _Ended(*_raised(word))
                yield ("pass", "") if word == "P" else _raised(word)
                word = ask_tests("go on", deadline)

    return run


def _stdio_job(_, tests: list[dict]) -> Callable:
    try:
        pairs = [(test["stdin"].encode(), test["stdout"].encode()) for test in tests]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"each test of stdio needs the strings stdin and stdout ({error!r})") from error
    if not pairs:
        raise ValueError("there is no test in stdio")

    def run(sandbox: _Sandbox, code: str, timeout_s: float, memory_mb: int) -> Iterator:
        yield len(pairs)
        for stdin, stdout in pairs:
            if timeout_s <= 0:
                raise _Ended("timeout", "out of time")
            with sandbox.processes(1, memory_mb, stdin, MAX_OUTPUT_BYTES + len(stdout)) as (program,):
                started = time.monotonic()
                try:
                    reply = program.ask(json.dumps(["program", code]), started + timeout_s, may_exit=True)
                    printed = program.rest_of_output()
                    if reply[:1] == "E":
                        yield _raised(reply)
                    else:
                        same = _lines(printed) == _lines(stdout)
                        yield ("pass", "") if same else ("fail", f"printed {printed[-DETAIL_CHARS:]!r}")
                except _Ended as ended:
                    yield ended.args
                timeout_s -= time.monotonic() - started

    return run


def _load_solution(solution: "_Process", what: list[str], deadline: float) -> None:
    reply = solution.ask(json.dumps(["solution", *what]), deadline)
    if reply != "R":
        raise _Ended(*_raised(reply))


def _raised(reply: str) -> tuple[str, str]:
    """(status, detail) of a reply that is no result. Its text is the code's own: read, never trusted."""
    try:
        _, message, _ = json.loads(reply[1:MAX_ERROR_CHARS])  # a longer one is cut, and then no JSON
        kind = message.partition(":")[0]
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise _Ended("crash", f"sent what is no reply: {reply[:DETAIL_CHARS]!r}") from None
    return {"MemoryError": "memory", "AssertionError": "fail"}.get(kind, "error"), message


def _lines(output: bytes) -> list[bytes]:
    return [line.rstrip() for line in output.rstrip().split(b"\n")]


def _tally(outcomes: Iterator) -> TestResult:
    total, passed, first = next(outcomes), 0, None
    try:
        for status, detail in outcomes:
            passed += status == "pass"
            first = first or (status != "pass" and (status, detail))
    except _Ended as ended:
        first = ended.args
    if first is None and passed < total:
        first = "crash", "not all tests were run"
    status, detail = first or ("pass", "")
    passed = min(passed, total - (status != "pass"))  # something between the tests may have failed
    printable = "".join(character if character.isprintable() else " " for character in detail[:DETAIL_CHARS])
    return TestResult(passed, total, status, printable)


# Processes


_RUNNING = object()


class _Process:
    """The sandbox's side of a process that runs untrusted code: a socket to it, and its output."""

    def __init__(
        self, sandbox: "_Sandbox", pid: int, channel: socket.socket, output: int, max_output_bytes: int
    ):
        self.sandbox, self.pid, self.status = sandbox, pid, _RUNNING
        self.channel, self.output, self.max_output_bytes = channel, output, max_output_bytes
        self.inbox, self.outbox, self.printed = bytearray(), memoryview(b""), bytearray()
        self.readable = {channel.fileno(), output}
        channel.setblocking(False)
        os.set_blocking(output, False)

    def await_ready(self) -> None:
        """Untrusted code is sent only to a process that has said, before it, that it is isolated."""
        try:
            first = self.reply(time.monotonic() + CONTROL_TIMEOUT_S)
        except _Ended as ended:
            raise _Broken(f"a process did not start: {ended.args[1]}") from ended
        if first != "ready":
            raise _Broken(first)

    def ask(
        self, line: str, deadline: float, max_bytes: int = MAX_REPLY_BYTES, may_exit: bool = False
    ) -> str:
        """The line that answers a line. may_exit: the process may also end, with status 0; then ""."""
        self._read_channel()
        if self.inbox:
            raise _Ended("crash", "replied before it was asked")
        self.outbox = memoryview(line.encode("latin-1") + b"\n")  # a reply passed on may hold any byte
        return self.reply(deadline, max_bytes, may_exit)

    def reply(self, deadline: float, max_bytes: int = MAX_REPLY_BYTES, may_exit: bool = False) -> str:
        searched = 0
        while (end := self.inbox.find(b"\n", searched)) < 0:
            searched = len(self.inbox)
            if searched > max_bytes:
                raise _Ended("output_limit", f"a result of more than {max_bytes} bytes")
            if self.channel.fileno() not in self.readable:
                (self.status,) = self.sandbox.end([self.pid], EXIT_GRACE_S)
                if may_exit and self.status == 0:
                    return ""
                raise _Ended("crash", _describe_exit(self.status))
            if not self._exchange(deadline):
                raise _Ended("timeout", "out of time")
        line = self.inbox[:end].decode("latin-1")
        del self.inbox[: end + 1]
        return line

    def rest_of_output(self) -> bytes:
        """All that was printed until now."""
        while self._read_output():
            pass
        return bytes(self.printed)

    def _exchange(self, deadline: float) -> bool:
        """Send and receive what the descriptors take and give. False: nothing until the deadline."""
        poll = select.poll()
        for descriptor in self.readable:
            poll.register(descriptor, select.POLLIN)
        if self.outbox:
            poll.register(self.channel, select.POLLIN | select.POLLOUT)
        events = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if self.outbox and events.get(self.channel.fileno(), 0) & select.POLLOUT:
            try:
                self.outbox = self.outbox[self.channel.send(self.outbox) :]
            except (BrokenPipeError, ConnectionResetError):
                self.outbox = memoryview(b"")  # nobody reads; what was written before can still be received
        if self.output in events:
            self._read_output()
        if self.channel.fileno() in events:
            self._read_channel()
        return bool(events) and time.monotonic() < deadline

    def _read_channel(self) -> None:
        with contextlib.suppress(BlockingIOError):
            chunk = b""
            with contextlib.suppress(ConnectionResetError):
                chunk = self.channel.recv(1 << 16)
            self.inbox += chunk
            if not chunk:
                self.readable.discard(self.channel.fileno())

    def _read_output(self) -> bool:
        """False: there is no more, now or at all."""
        try:
            chunk = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return False
        self.printed += chunk
        if len(self.printed) > self.max_output_bytes:
            raise _Ended("output_limit", f"printed more than {self.max_output_bytes} bytes")
        if not chunk:
            self.readable.discard(self.output)
        return bool(chunk)


def _describe_exit(status: int | None) -> str:
    if status is None:
        return "closed its channel and went on"
    if status == -signal.SIGKILL:  # which it cannot send itself
        raise _Killed("a process was killed from outside")
    return (
        f"killed by signal {-status}"
        if status < 0
        else f"exited with status {status} in the middle of a test"
    )


class _Sandbox:
    """A warm interpreter (zygote.py) and the processes forked from it.

    SandboxError: this machine cannot protect itself.
    """

    def __init__(self):
        if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
            raise SandboxError(
                "the code sandbox needs Linux on x86-64 or aarch64, and this is "
                f"{platform.system()} on {platform.machine()}: use a virtual machine or a container there"
            )
        zygote = str(Path(__file__).with_name("zygote.py"))
        # No site-packages, no bytecode written.
        options = ["-s", "-S", "-B", "-X", "utf8"]
        with _no_fork:
            self.control, inherited = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with inherited:  # not as standard input or output, should the caller have closed those
                theirs = socket.socket(fileno=fcntl.fcntl(inherited, fcntl.F_DUPFD_CLOEXEC, 3))
            with theirs:
                self.interpreter = subprocess.Popen(
                    [sys.executable, *options, zygote, str(theirs.fileno()), ",".join(LAYERS)],
                    pass_fds=[theirs.fileno()], env=ENVIRONMENT, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                )  # fmt: skip
            _sandboxes.add(self)
        try:
            self.layers = self._answer(START_TIMEOUT_S)
            self._require_protection()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the interpreter; its processes die with it."""
        self.control.close()  # at which it ends by itself
        try:
            self.interpreter.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self._kill()
        self.interpreter.stderr.close()

    def _kill(self) -> None:
        if self.interpreter.poll() is None:
            os.killpg(self.interpreter.pid, signal.SIGKILL)
            self.interpreter.wait()

    @contextlib.contextmanager
    def processes(
        self, count: int, memory_mb: int, stdin: bytes = b"", max_output_bytes: int = MAX_OUTPUT_BYTES
    ) -> Iterator[list["_Process"]]:
        """Isolated processes that wait for their first line. They do not outlive the context."""
        with contextlib.ExitStack() as stack:
            started = [self._start(stack, memory_mb, stdin, max_output_bytes) for _ in range(count)]
            try:
                for process in started:
                    process.await_ready()
                yield started
            finally:
                self.end([process.pid for process in started if process.status is _RUNNING], 0.0)

    def _start(
        self, stack: contextlib.ExitStack, memory_mb: int, stdin: bytes, max_output_bytes: int
    ) -> "_Process":
        with _no_fork:
            channel, their_channel = socket.socketpair()
            read_end, write_end = os.pipe()
            stack.enter_context(channel)
            output = stack.enter_context(open(read_end, "rb", 0))
            their_output, their_stdin = open(write_end, "wb", 0), open(os.memfd_create("stdin"), "wb", 0)
            with their_channel, their_output, their_stdin, open(os.devnull, "wb", 0) as nowhere:
                their_stdin.write(stdin)
                their_stdin.seek(0)
                given = [file.fileno() for file in (their_stdin, their_output, nowhere, their_channel)]
                self._order({"memory_mb": memory_mb}, given)
        pid = self._answer(CONTROL_TIMEOUT_S)["pid"]
        return _Process(self, pid, channel, output.fileno(), max_output_bytes)

    def end(self, pids: list[int], grace_s: float) -> list[int | None]:
        """Exit statuses, after up to grace_s; None for a process that had to be killed then."""
        self._order({"end": pids, "grace_s": grace_s}, [])
        return self._answer(CONTROL_TIMEOUT_S)["statuses"]

    def probe(self) -> dict[str, str]:
        """What a program that tries forbidden acts reports: act -> the exception that stopped it."""
        target = json.dumps([__file__, str(Path(__file__).parent)]).encode()
        with self.processes(1, 64, target) as (program,):
            try:
                program.ask(json.dumps(["program", PROBE]), time.monotonic() + CONTROL_TIMEOUT_S)
                return json.loads(program.rest_of_output())
            except (_Ended, ValueError) as error:
                raise _Broken(f"the probe failed: {error}") from error

    def _require_protection(self) -> None:
        if "on" not in (self.layers["namespaces"], self.layers["landlock"]):
            raise SandboxError(
                "nothing on this machine keeps untrusted code from reading files: "
                + "; ".join(f"{name}: {state}" for name, state in self.layers.items())
                + ". Use a kernel with landlock (Linux 5.13 or later), or allow unprivileged user namespaces"
            )
        outcomes = self.probe()
        if outcomes.pop("import a module") != "possible":
            library = Path(os.__file__).parent
            closed = [
                str(folder) for folder in (library, *library.parents) if not folder.stat().st_mode & 0o001
            ]
            raise SandboxError(
                "other users, as which code runs where root starts it, cannot read the standard library in "
                f"{library}: chmod o+x {' '.join(closed)}, or use a Python that is installed elsewhere"
            )
        for act, outcome in outcomes.items():
            if outcome == "possible":
                raise SandboxError(f"the code sandbox leaks on this machine: it is possible to {act}")

    def _order(self, order: dict, descriptors: list[int]) -> None:
        try:
            socket.send_fds(self.control, [json.dumps(order).encode()], descriptors)
        except OSError as error:
            raise _Broken(f"the interpreter does not listen: {error}") from error

    def _answer(self, timeout_s: float) -> dict:
        self.control.settimeout(timeout_s)
        try:
            message = self.control.recv(1 << 16)
        except OSError as error:
            raise _Broken(f"the interpreter does not answer: {error}") from error
        if not message:
            self._kill()
            complaint = self.interpreter.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise _Broken(f"the interpreter ended: {complaint or 'no reason given'}")
        return json.loads(message)


PROBE = """
import json, os, socket, sys
host_file, host_folder = json.loads(input())

def write_file():
    for folder in ("/tmp", "/dev/shm", os.getcwd(), "/"):
        try:
            return open(folder + "/probe", "w")
        except OSError as error:
            refusal = error
    raise refusal

def read_environment():
    if not os.environ:
        raise KeyError("empty")

acts = {
    "read a file": lambda: open(host_file).read(),
    "list a folder": lambda: os.listdir(host_folder),
    "write a file": write_file,
    "open a socket": lambda: socket.socket(),
    "start a process": lambda: os.fork() or os._exit(0),
    "signal a process": lambda: os.kill(os.getppid(), 0),
    "read the environment": read_environment,
    "import a module": lambda: __import__("colorsys"),
}
outcomes = {}
for name, act in acts.items():
    try:
        act()
        outcomes[name] = "possible"
    except Exception as error:
        outcomes[name] = f"refused: {type(error).__name__}"
print(json.dumps(outcomes))
"""


# Sandboxes are kept between jobs, one for each that runs at the same time


_sandboxes: weakref.WeakSet[_Sandbox] = weakref.WeakSet()
# Held while this process has the other ends of a process's sockets: a child that another thread forks then
# would keep them open, and a crash would look like silence. Not held while an answer is awaited.
_no_fork = threading.RLock()


@functools.cache
def _idle_sandboxes(process_id: int) -> list[_Sandbox]:
    """Of one process: a forked child must not talk over its parent's sockets."""
    return []


def _attempt(job: Callable):
    """job(sandbox), with a sandbox of its own for the time; once more with a new one if the sandbox fails."""
    idle = _idle_sandboxes(os.getpid())
    for attempt in range(ATTEMPTS):
        sandbox = None
        try:
            with contextlib.suppress(IndexError):
                sandbox = idle.pop() if attempt == 0 else None
            sandbox = sandbox or _Sandbox()
            result = job(sandbox)
        except ValueError:  # the tests are malformed, the sandbox is not
            idle.append(sandbox)
            raise
        except BaseException as error:  # also Ctrl-C, in the middle of an exchange
            if sandbox is not None:
                sandbox.close()
            if not isinstance(error, _Broken | OSError):
                raise
            failure = error
        else:
            idle.append(sandbox)
            return result
    raise SandboxError(f"the code sandbox failed {ATTEMPTS} times: {failure}") from failure


@atexit.register
def _close_idle_sandboxes() -> None:
    for sandbox in _idle_sandboxes(os.getpid()):
        sandbox.close()


def _leave_to_the_parent() -> None:
    """In a forked child: while it holds the sockets, no interpreter would see that the parent is gone."""
    _no_fork.release()
    for sandbox in _sandboxes:
        sandbox.control.close()


os.register_at_fork(
    before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_leave_to_the_parent
)
