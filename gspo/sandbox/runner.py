"""Run untrusted Python against tests: a result that cannot be forged, on a machine that is not touched.

    python -m gspo.sandbox      what protects this machine, and what a program that tries to get out is told

`run_tests(code, tests)` is the whole interface. A policy under reinforcement learning finds every hole in its
reward, so these hold:

The result. No test and no expected value enters the process that runs the solution, or a process whose memory
that one inherits. Arguments and results travel as plain data (plain_data.py), and this module compares their
texts, types and all: what a subclass adds, an `__eq__` above all, stays behind. Asserts run in a second
process, for which the solution is a function that answers with plain data or an exception. So objects that
equal everything, patched built-ins, frames, the garbage collector, atexit, exit codes and markers on
descriptors prove nothing: only the right answers do. A reply that nobody asked for ends the job.

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
tried once more; then it is a SandboxError, and never a result.

Not covered: faults of the kernel; side channels such as timing; the processor time of 32 threads until the
deadline; memory that the kernel holds for a process, page tables above all, up to about as much again as
memory_mb. Where landlock works alone, stat() and readlink() tell which files exist; and if the caller is not
root there (or is root of a user namespace with few ids), the kernel counts threads for the caller's user as a
whole: a job starts none while that user has 1,024, so a job that takes them all leaves none to other jobs.

Programs have no file to write, no sub-processes, no shared memory, no network, no third-party packages, and
32 threads at most, those of a job's two processes together.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

from gspo.sandbox import plain_data
from gspo.sandbox.processes import (
    CONTROL_TIMEOUT_S,
    MAX_OUTPUT_BYTES,
    MAX_REPLY_BYTES,
    KilledFromOutside,
    Process,
    ProcessEnded,
    Sandbox,
    SandboxBroken,
    SandboxError,
    with_sandbox,
)

MAX_TIMEOUT_S, MAX_MEMORY_MB = 86400.0, 2**20
MAX_TESTS_BYTES = 64 * 2**20  # one line of the asserts' process, which may hold their own large arguments
MAX_ERROR_CHARS = 50_000  # of an exception; honest ones take half of it, and parsing takes 25 bytes for each
DETAIL_CHARS = 300

Outcome = tuple[str, str]  # (status, detail) of one test
# Yields the number of tests, then each one's outcome. It may end early with ProcessEnded, for the tests left.
Outcomes = Iterator[Any]
Job = Callable[[Sandbox, str, float, int], Outcomes]  # (sandbox, code, timeout_s, memory_mb)


@dataclass(frozen=True)
class TestResult:
    """What came of some tests.

    passed: how many of the total passed. status: "pass" if all did, else that of the first which did not:
    "fail", "error", "timeout", "memory", "crash" or "output_limit". detail: a line for the reader, which may
    quote the code's words.
    """

    __test__ = False  # pytest shall not collect this class

    passed: int
    total: int
    status: str
    detail: str = ""


def run_tests(code: str, tests: dict, timeout_s: float = 5.0, memory_mb: int = 512) -> TestResult:
    r"""Run untrusted code against tests, which have one of three forms:

        {"entry_point": "f", "calls": [{"args": [...], "expected": ...}, ...]}
        {"entry_point": "f", "asserts": "assert f(3) == 14\nassert ..."}
        {"stdio": [{"stdin": "3\n", "stdout": "14\n"}, ...]}

    calls: results are compared strictly, False is not 0, but an instance of a subclass (Counter, IntEnum, a
    named tuple) counts as its plain part; "kwargs" may stand beside "args". asserts: each assert at the top
    level, and each call of a function that they define, such as check(f), is a test. stdio: the code runs
    once for each test, and its whole output is compared, white space at the ends of lines and at the end
    aside.

    What asserts cannot have, since f runs in another process: an f that changes its arguments in place (it
    has copies); arguments that are no plain data, such as iterators, functions, Decimals and instances (a
    ValueError, once they are passed); results of such kinds (an error of the code); a class in place of f.

    timeout_s: wall-clock time for all tests together. memory_mb: address space of each process, beside what
    the interpreter itself takes. ValueError: malformed tests or limits. SandboxError: the sandbox failed.
    """
    if not (isinstance(code, str) and 0 < timeout_s < MAX_TIMEOUT_S and 0 < memory_mb < MAX_MEMORY_MB):
        raise ValueError(f"code must be a string, timeout_s {timeout_s} and memory_mb {memory_mb} positive")
    code = code.removeprefix("\ufeff")  # a byte order mark
    whole_mb = math.ceil(memory_mb)
    job = _job_of(tests)
    try:
        return with_sandbox(lambda sandbox: _tally(job(sandbox, code, timeout_s, whole_mb)))
    except SandboxError as error:
        if not isinstance(error.__cause__, KilledFromOutside):
            raise
        return TestResult(0, 1, "memory", "killed by the kernel: the machine is out of memory")


def check_machine() -> dict[str, str]:
    """Tell what protects this machine: layer or forbidden act -> its state.

    SandboxError: it is not enough.
    """
    return with_sandbox(lambda sandbox: sandbox.layers | sandbox.probe())


# The three forms of tests


def _job_of(tests: dict) -> Job:
    """The job that a dictionary of tests describes. ValueError: it is malformed."""
    forms: dict[str, Callable[[str, Any], Job]] = {
        "calls": _calls_job,
        "asserts": _asserts_job,
        "stdio": _stdio_job,
    }
    given = [form for form in forms if isinstance(tests, dict) and form in tests]
    if len(given) != 1:
        raise ValueError(f"tests must be a dictionary with one of the keys {', '.join(forms)}")
    name: Any = tests.get("entry_point")
    (form,) = given
    is_name = isinstance(name, str) and name.isidentifier() and not iskeyword(name)
    if form != "stdio" and not is_name:
        raise ValueError(f"entry_point must be the name of a function, not {name!r}")
    return forms[form](name, tests[form])


def _calls_job(name: str, calls: list[dict]) -> Job:
    """One process executes the code. The results of the calls are compared here."""
    try:
        requests = [plain_data.encode(_arguments(call)) for call in calls]
        expected = [plain_data.comparable(call["expected"]) for call in calls]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"each of calls needs args and expected, both of plain data ({error!r})") from error
    if not requests:
        raise ValueError("there are no calls to test")

    def job(sandbox: Sandbox, code: str, timeout_s: float, memory_mb: int) -> Outcomes:
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

    return job


def _arguments(call: dict) -> tuple[list, dict]:
    args, kwargs = call["args"], call.get("kwargs", {})
    are_kinds = isinstance(args, list | tuple) and isinstance(kwargs, dict)
    if not are_kinds or not all(map(str.isidentifier, kwargs)):
        raise TypeError("args must be a list, and kwargs a dictionary of names")
    return list(args), kwargs


def _asserts_job(name: str, asserts: str) -> Job:
    """One process executes the code, another the asserts. What they say goes through here."""
    if not isinstance(asserts, str):
        raise ValueError("asserts must be a string of Python statements")

    def job(sandbox: Sandbox, code: str, timeout_s: float, memory_mb: int) -> Outcomes:
        with sandbox.processes(2, memory_mb) as (solution, tests):
            ask_tests = functools.partial(tests.ask, max_bytes=MAX_TESTS_BYTES)
            try:
                order = json.dumps(["tests", asserts, name])
                count = ask_tests(order, time.monotonic() + CONTROL_TIMEOUT_S)
            except ProcessEnded as ended:
                status, detail = ended.args
                kind = SandboxBroken if status == "timeout" else ValueError
                raise kind(f"reading the asserts: {detail}") from None
            if count[:1] == "X":
                raise ValueError(f"asserts are no tests: {_raised(count)[1]}")
            if count[:1] != "N" or count == "N0":
                raise ValueError("asserts are no tests: none")
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
                    raise ProcessEnded(*_raised(word))
                yield ("pass", "") if word == "P" else _raised(word)
                word = ask_tests("go on", deadline)

    return job


def _stdio_job(_: str, tests: list[dict]) -> Job:
    """A new process executes the code for each test. What it prints is compared here."""
    try:
        pairs = [(test["stdin"].encode(), test["stdout"].encode()) for test in tests]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"each test of stdio needs the strings stdin and stdout ({error!r})") from error
    if not pairs:
        raise ValueError("there is no test in stdio")

    def job(sandbox: Sandbox, code: str, timeout_s: float, memory_mb: int) -> Outcomes:
        yield len(pairs)
        for stdin, stdout in pairs:
            if timeout_s <= 0:
                raise ProcessEnded("timeout", "out of time")
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
                except ProcessEnded as ended:
                    yield ended.args
                timeout_s -= time.monotonic() - started

    return job


def _load_solution(solution: Process, what: list[str], deadline: float) -> None:
    """Have the code executed. ProcessEnded: it raises an exception or does not define the function."""
    reply = solution.ask(json.dumps(["solution", *what]), deadline)
    if reply != "R":
        raise ProcessEnded(*_raised(reply))


def _raised(reply: str) -> Outcome:
    """The outcome of a reply that is no result. Its text is the code's own: it is read, but never trusted."""
    try:
        _, message, _ = json.loads(reply[1:MAX_ERROR_CHARS])  # a longer one is cut, and then no JSON
        kind = message.partition(":")[0]
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ProcessEnded("crash", f"sent what is no reply: {reply[:DETAIL_CHARS]!r}") from None
    return {"MemoryError": "memory", "AssertionError": "fail"}.get(kind, "error"), message


def _lines(output: bytes) -> list[bytes]:
    return [line.rstrip() for line in output.rstrip().split(b"\n")]


def _tally(outcomes: Outcomes) -> TestResult:
    total, passed = next(outcomes), 0
    first: Outcome | None = None  # of those that did not pass
    try:
        for status, detail in outcomes:
            if status == "pass":
                passed += 1
            elif first is None:
                first = status, detail
    except ProcessEnded as ended:
        first = ended.args
    if first is None and passed < total:
        first = "crash", "not all tests were run"
    status, detail = first or ("pass", "")
    if status != "pass":
        passed = min(passed, total - 1)  # all tests may have passed where something between them failed
    printable = "".join(character if character.isprintable() else " " for character in detail[:DETAIL_CHARS])
    return TestResult(passed, total, status, printable)
