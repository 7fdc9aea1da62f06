"""The parent's side of the sandbox: warm interpreters, and the processes that are forked from them.

A `Sandbox` is a warm interpreter (zygote.py) that has given up its rights. A `Process` is one of its forks,
which runs untrusted code for one job. Sandboxes are kept between jobs; `with_sandbox` hands one to a job, and
replaces it if it fails.
"""

import atexit
import contextlib
import fcntl
import functools
import json
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
from pathlib import Path
from typing import TypeVar

MAX_OUTPUT_BYTES = 2**20  # printed by one process
MAX_REPLY_BYTES = 4 * 2**20  # one result, beyond the length of the right one where that is known
START_TIMEOUT_S = 60.0  # for the interpreter, from a cold disk
CONTROL_TIMEOUT_S = 20.0  # a fork or a kill takes milliseconds, on an overloaded machine longer
EXIT_GRACE_S = 0.5  # between a process's last word and its end
ATTEMPTS = 2  # before a failure of the sandbox itself is reported
# For the interpreter: the same code has the same result, and a thread does not reserve 64 MB of address
# space.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
LAYERS = ("namespaces", "landlock")  # what to try; fewer only in tests

Result = TypeVar("Result")


class SandboxError(RuntimeError):
    """The sandbox itself does not work, on this machine or this time. It says nothing of the code."""


class ProcessEnded(Exception):
    """A process that runs the code came to an end that the tests did not ask for. args: status, detail."""


class SandboxBroken(Exception):
    """The sandbox itself failed."""


class KilledFromOutside(SandboxBroken):
    """A process was killed from outside, most likely by the kernel for want of memory."""


# Processes


class Process:
    """A process that runs untrusted code, seen from here: a socket to it, and its output."""

    def __init__(
        self, sandbox: "Sandbox", pid: int, channel: socket.socket, output: int, max_output_bytes: int
    ):
        self.sandbox, self.pid, self.is_running = sandbox, pid, True
        self.channel, self.output, self.max_output_bytes = channel, output, max_output_bytes
        self.inbox, self.outbox, self.printed = bytearray(), memoryview(b""), bytearray()
        self.readable = {channel.fileno(), output}
        channel.setblocking(False)
        os.set_blocking(output, False)

    def await_ready(self) -> None:
        """Wait until the process says that it is isolated. Only then may untrusted code be sent to it."""
        try:
            first = self.reply(time.monotonic() + CONTROL_TIMEOUT_S)
        except ProcessEnded as ended:
            raise SandboxBroken(f"a process did not start: {ended.args[1]}") from ended
        if first != "ready":
            raise SandboxBroken(first)

    def ask(
        self, line: str, deadline: float, max_bytes: int = MAX_REPLY_BYTES, may_exit: bool = False
    ) -> str:
        """Send a line and return the line that answers it.

        may_exit: the process may also end, with status 0; then the answer is "". ProcessEnded: it timed out,
        crashed, or sent more than max_bytes.
        """
        self._read_channel()
        if self.inbox:
            raise ProcessEnded("crash", "replied before it was asked")
        self.outbox = memoryview(line.encode("latin-1") + b"\n")  # a reply passed on may hold any byte
        return self.reply(deadline, max_bytes, may_exit)

    def reply(self, deadline: float, max_bytes: int = MAX_REPLY_BYTES, may_exit: bool = False) -> str:
        """The next line that the process sends; as `ask`."""
        searched = 0
        while (end := self.inbox.find(b"\n", searched)) < 0:
            searched = len(self.inbox)
            if searched > max_bytes:
                raise ProcessEnded("output_limit", f"a result of more than {max_bytes} bytes")
            if self.channel.fileno() not in self.readable:
                (status,) = self.sandbox.end([self.pid], EXIT_GRACE_S)
                self.is_running = False
                if may_exit and status == 0:
                    return ""
                raise ProcessEnded("crash", _describe_exit(status))
            if not self._exchange(deadline):
                raise ProcessEnded("timeout", "out of time")
        line = self.inbox[:end].decode("latin-1")
        del self.inbox[: end + 1]
        return line

    def rest_of_output(self) -> bytes:
        """All that was printed until now."""
        while self._read_output():
            pass
        return bytes(self.printed)

    def _exchange(self, deadline: float) -> bool:
        """Wait until a descriptor is ready, then send and receive. False: the deadline has passed."""
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
        """Read some of what was printed. False: there is no more, now or at all."""
        try:
            chunk = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return False
        self.printed += chunk
        if len(self.printed) > self.max_output_bytes:
            raise ProcessEnded("output_limit", f"printed more than {self.max_output_bytes} bytes")
        if not chunk:
            self.readable.discard(self.output)
        return bool(chunk)


def _describe_exit(status: int | None) -> str:
    if status is None:
        return "closed its channel and went on"
    if status == -signal.SIGKILL:  # which it cannot send itself
        raise KilledFromOutside("a process was killed from outside")
    if status < 0:
        return f"killed by signal {-status}"
    return f"exited with status {status} in the middle of a test"


class Sandbox:
    """A warm interpreter (zygote.py) and the processes forked from it.

    SandboxError: this machine cannot protect itself.
    """

    def __init__(self) -> None:
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
            with inherited:  # its descriptor may be 0 or 1, if the caller has closed those: take another
                theirs = socket.socket(fileno=fcntl.fcntl(inherited, fcntl.F_DUPFD_CLOEXEC, 3))
            with theirs:
                self.interpreter = subprocess.Popen(
                    [sys.executable, *options, zygote, str(theirs.fileno()), ",".join(LAYERS)],
                    pass_fds=[theirs.fileno()], env=ENVIRONMENT, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                )  # fmt: skip
            _all_sandboxes.add(self)
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
        assert self.interpreter.stderr
        self.interpreter.stderr.close()

    def _kill(self) -> None:
        if self.interpreter.poll() is None:
            os.killpg(self.interpreter.pid, signal.SIGKILL)
            self.interpreter.wait()

    @contextlib.contextmanager
    def processes(
        self, count: int, memory_mb: int, stdin: bytes = b"", max_output_bytes: int = MAX_OUTPUT_BYTES
    ) -> Iterator[list[Process]]:
        """Fork isolated processes that wait for their first line. They do not outlive the context.

        memory_mb: address space of each, beside the interpreter's. stdin: what each reads on standard input.
        """
        with contextlib.ExitStack() as stack:
            started = [self._start(stack, memory_mb, stdin, max_output_bytes) for _ in range(count)]
            try:
                for process in started:
                    process.await_ready()
                yield started
            finally:
                self.end([process.pid for process in started if process.is_running], 0.0)

    def _start(
        self, stack: contextlib.ExitStack, memory_mb: int, stdin: bytes, max_output_bytes: int
    ) -> Process:
        """Fork one process. The stack closes this side's ends of its channel and its output."""
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
        return Process(self, pid, channel, output.fileno(), max_output_bytes)

    def end(self, pids: list[int], grace_s: float) -> list[int | None]:
        """End processes and return their exit statuses; None for one that was killed after grace_s."""
        self._order({"end": pids, "grace_s": grace_s}, [])
        return self._answer(CONTROL_TIMEOUT_S)["statuses"]

    def probe(self) -> dict[str, str]:
        """Run a program that tries forbidden acts. Returns: act -> the exception that stopped it."""
        target = json.dumps([__file__, str(Path(__file__).parent)]).encode()
        with self.processes(1, 64, target) as (program,):
            try:
                program.ask(json.dumps(["program", PROBE]), time.monotonic() + CONTROL_TIMEOUT_S)
                return json.loads(program.rest_of_output())
            except (ProcessEnded, ValueError) as error:
                raise SandboxBroken(f"the probe failed: {error}") from error

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
            raise SandboxBroken(f"the interpreter does not listen: {error}") from error

    def _answer(self, timeout_s: float) -> dict:
        self.control.settimeout(timeout_s)
        try:
            message = self.control.recv(1 << 16)
        except OSError as error:
            raise SandboxBroken(f"the interpreter does not answer: {error}") from error
        if not message:
            self._kill()
            assert self.interpreter.stderr
            complaint = self.interpreter.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise SandboxBroken(f"the interpreter ended: {complaint or 'no reason given'}")
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


# Sandboxes are kept between jobs, one for each job that runs at the same time


_all_sandboxes: weakref.WeakSet[Sandbox] = weakref.WeakSet()
# Held while this process has both ends of a process's sockets. A child that another thread forks meanwhile
# would keep the process's ends open, and a crash would look like silence. Not held while an answer is
# awaited.
_no_fork = threading.RLock()


@functools.cache
def idle_sandboxes(process_id: int) -> list[Sandbox]:
    """The sandboxes of one process that no job uses. A forked child must not use its parent's."""
    return []


def with_sandbox(job: Callable[[Sandbox], Result]) -> Result:
    """Return job(sandbox), with a sandbox that no other job uses meanwhile.

    If the sandbox fails, the job is done once more with a new one. SandboxError: that failed too.
    """
    idle = idle_sandboxes(os.getpid())
    failure: BaseException | None = None
    for attempt in range(ATTEMPTS):
        sandbox = None
        try:
            if attempt == 0:
                with contextlib.suppress(IndexError):
                    sandbox = idle.pop()
            sandbox = sandbox or Sandbox()
            result = job(sandbox)
        except ValueError:  # the tests are malformed, the sandbox is in order
            if sandbox is not None:
                idle.append(sandbox)
            raise
        except BaseException as error:  # also Ctrl-C, in the middle of an exchange
            if sandbox is not None:
                sandbox.close()
            if not isinstance(error, SandboxBroken | OSError):
                raise
            failure = error
        else:
            idle.append(sandbox)
            return result
    raise SandboxError(f"the code sandbox failed {ATTEMPTS} times: {failure}") from failure


@atexit.register
def _close_idle_sandboxes() -> None:
    for sandbox in idle_sandboxes(os.getpid()):
        sandbox.close()


def _leave_to_the_parent() -> None:
    """Close the sockets in a forked child, or no interpreter would see that the parent is gone."""
    _no_fork.release()
    for sandbox in _all_sandboxes:
        sandbox.control.close()


os.register_at_fork(
    before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_leave_to_the_parent
)
