"""The warm interpreter of the code sandbox: isolated once, forked for each process that runs untrusted code.

    python zygote.py CONTROL LAYERS     started by processes.py; CONTROL is a socket's descriptor

No text of a job passes through this process: the parent hands over descriptors, and the forked child reads
and writes them. So a child's memory, a copy of this one, holds nothing of another job. What a child does
depends on the first line that it reads:

    ["solution", code, name, form]   execute the code, then call its function `name` with each line of
                                     arguments; form: how results are written, "encode" or "comparable"
    ["tests", asserts, name]         execute the tests, for which the function is a call to the other process
    ["program", code]                execute the code as __main__, with the test's stdin and stdout

This file is executed as a script under python -S, so its siblings are top-level modules here.
"""

import ast
import atexit
import builtins
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import signal
import site
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gspo.sandbox import isolation, plain_data
else:
    import isolation
    import plain_data

LIBRARY = os.path.dirname(os.__file__)
CHANNEL = 3  # the child's descriptor of its socket to the sandbox
MESSAGE_CHARS = 300
MAX_THREADS = 32  # of a sandbox that has its user to itself
MAX_THREADS_OF_USER = 1024  # where the threads of all that the caller's user started are counted together
THREAD_STACK_BYTES = 8 * 2**20  # by default it is the caller's limit, which may be beyond memory_mb
MAX_ARGUMENTS_CHARS = 10_000  # of an exception

Send = Callable[[str], None]  # writes a line to the parent
# Loaded before the fork, where they cost a job nothing; a child cannot load compiled modules.
PRELOADED = """
    _bisect _blake2 _bz2 _codecs_cn _codecs_hk _codecs_iso2022 _codecs_jp _codecs_kr _codecs_tw _csv
    _datetime _decimal _elementtree _hashlib _heapq _json _lsprof _lzma _md5 _multibytecodec
    _multiprocessing _opcode _pickle _posixsubprocess _queue _random _sha1 _sha2 _sha256 _sha3 _sha512
    _socket _sqlite3 _statistics _struct _typing _uuid _zoneinfo array ast asyncio base64 binascii bisect
    bz2 calendar cmath collections contextlib copy csv dataclasses datetime decimal difflib
    encodings.ascii encodings.idna encodings.latin_1 encodings.utf_16 enum fcntl fractions functools grp
    gzip hashlib heapq html inspect io itertools json logging lzma math mmap numbers operator pickle
    platform pprint pyexpat queue random re resource secrets select shlex statistics string struct termios
    textwrap threading time timeit traceback types typing unicodedata unittest uuid weakref zlib
""".split()
# What a call of the solution may raise in the tests. They are named by number, so that a name proves nothing.
# StopIteration is not among them, as it ends a loop in silence: all(map(f, cases)) would hold if f raised it.
EXCEPTIONS = [
    kind
    for _, kind in sorted(vars(builtins).items())
    if isinstance(kind, type)
    and issubclass(kind, Exception)
    and not issubclass(kind, Warning | StopIteration | StopAsyncIteration)
]
NO_EXCEPTION = -1  # SystemExit, KeyboardInterrupt and other things that only BaseException catches


# The zygote


def main() -> None:
    control, wanted = socket.socket(fileno=int(sys.argv[1])), sys.argv[2].split(",")
    # The caller may ignore this signal, and then no child could be waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        # Out of memory, the kernel shall kill a job and not the training run that it serves.
        Path("/proc/self/oom_score_adj").write_text("1000")
    nowhere = os.open(os.devnull, os.O_RDWR)
    prepare_interpreter()
    own_memory = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    layers, fork = isolate(wanted)
    alone = layers["namespaces"] == "on" or os.geteuid() >= isolation.FIRST_OWN_USER
    seccomp = isolation.seccomp_filter(isolation.ARCHITECTURE)
    os.dup2(nowhere, 2)
    gc.freeze()  # collections in children would otherwise copy every page
    control.sendall(json.dumps(layers).encode())

    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1024, 4)
        if not message:  # the parent is gone
            return
        order = json.loads(message)
        if "end" in order:
            control.sendall(json.dumps({"statuses": end(order["end"], order["grace_s"])}).encode())
            continue
        pid = fork()
        if pid == 0:
            max_threads = MAX_THREADS if alone else MAX_THREADS_OF_USER
            limits = {"memory_bytes": own_memory + order["memory_mb"] * 2**20, "max_threads": max_threads}
            become_child(descriptors, seccomp, limits)
        for descriptor in descriptors:
            os.close(descriptor)
        control.sendall(json.dumps({"pid": pid}).encode())


def end(pids: list[int], grace_s: float) -> list[int | None]:
    """Reap children and return their exit statuses.

    None for one that did not end by itself within grace_s, so that it was killed.
    """
    deadline = time.monotonic() + grace_s
    statuses: dict[int, int | None] = {}
    while len(statuses) < len(pids):
        for pid in set(pids) - statuses.keys():
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if reaped:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            break
        time.sleep(0.001)
    killed = [pid for pid in pids if pid not in statuses]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    for pid in killed:
        os.waitpid(pid, 0)
    return [statuses.get(pid) for pid in pids]


def prepare_interpreter() -> None:
    """Set up what a program finds: the standard library, common modules, no environment, fixed seeds."""
    sys.path[:] = [path for path in sys.path if Path(path).is_relative_to(LIBRARY)]
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # not in this version of Python
            importlib.import_module(name)
    site.setquit()  # exit() and quit(), which python -S leaves out
    sys.argv[:] = ["solution.py"]
    os.environ.clear()
    threading.stack_size(THREAD_STACK_BYTES)
    os.register_at_fork(after_in_child=lambda: random.seed(0))  # after random's own, which seeds by the clock


def isolate(wanted: list[str]) -> tuple[dict[str, str], Callable[[], int]]:
    """Close this process off, as far as the kernel allows.

    Returns: layer -> "on", or why it is not, and the user's id; and how to fork.
    """
    os.chdir(LIBRARY)
    layers = {"namespaces": "not wanted", "landlock": "not wanted"}
    fork: Callable[[], int] = os.fork
    rules: int | None = None

    @contextlib.contextmanager
    def trying(layer: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            layers[layer] = str(error.strerror)

    if "landlock" in wanted:
        with trying(
            "landlock"
        ):  # before root becomes another user, who may not reach its files by their paths
            visible = (entry for entry in os.scandir(LIBRARY) if entry.name not in isolation.HIDDEN)
            rules = isolation.rules_to_read(entry.path for entry in visible)
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # root of a namespace that knows no other user is no root
            isolation.become_nobody()
    if "namespaces" in wanted:
        with trying("namespaces"):
            own_namespace = isolation.enter_namespaces()
            fork = functools.partial(isolation.fork_into_pid_namespace, own_namespace)
            layers["namespaces"] = "on"
    if rules is not None:
        with trying("landlock"):
            isolation.restrict_files(rules)
            layers["landlock"] = "on"
    return layers | {"user": f"id {os.geteuid()}"}, fork


# The child


def become_child(descriptors: list[int], seccomp: bytes, limits: dict[str, int]) -> None:
    """Wire the descriptors up, close everything else, give up all rights, and do what the first line says.

    descriptors: standard input, output, where messages go, and the channel to the parent. Does not return.
    """
    moved = [os.dup(descriptor) for descriptor in descriptors]  # so that none is overwritten below
    for descriptor, place in zip(moved, (0, 1, 2, CHANNEL), strict=True):
        os.dup2(descriptor, place)
    os.closerange(CHANNEL + 1, 1 << 20)
    try:
        isolation.drop_privileges(seccomp, **limits)
    except BaseException as error:
        os.write(CHANNEL, f"failed: {error}\n".encode())
        os._exit(1)
    lines = open(CHANNEL, encoding="latin-1", newline="\n")

    def send(text: str) -> None:
        rest = memoryview(text.encode("ascii") + b"\n")
        while rest:
            rest = rest[os.write(CHANNEL, rest) :]

    send("ready")
    role, *arguments = json.loads(lines.readline())
    roles: dict[str, Callable] = {
        "solution": serve_solution,
        "tests": serve_tests,
        "program": serve_program,
    }
    roles[role](lines, send, *arguments)
    os._exit(0)


def serve_solution(lines: Iterable[str], send: Send, code: str, name: str, form: str) -> None:
    """Answer each line of arguments: "R" and the result, or "E" and the exception."""
    write = {"encode": plain_data.encode, "comparable": plain_data.comparable}[form]
    try:
        function = getattr(execute_as_module(code, "solution"), name)
    except BaseException as error:
        return send("E" + describe(error))
    send("R")
    for line in lines:
        try:
            arguments, keywords = plain_data.decode(line)
            reply = "R" + write(function(*arguments, **keywords))
        except BaseException as error:
            reply = "E" + describe(error)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        send(reply)


def serve_tests(lines: IO[str], send: Send, asserts: str, name: str) -> None:
    """Execute the tests in lockstep with the parent, which answers each line before the next one.

    The lines are "N" and the number of tests; then for each test "P" if it passes, or "E" and why not; then
    "D". In between come "C" and arguments for each call of the solution; "Q" and why, if a statement between
    the tests failed; "X" and why, if these are no tests, whatever the solution.
    """

    def ask(text: str) -> str:
        send(text)
        return lines.readline()

    def solution(*arguments: Any, **keywords: Any) -> Any:
        try:
            request = "C" + plain_data.encode((list(arguments), keywords))
        except TypeError as error:  # not ValueError: the solution may have returned what is nested too deeply
            request = "X" + describe(error)  # at which the sandbox ends this process
        reply = ask(request)
        if reply[:1] == "R":
            return plain_data.decode(reply[1:])
        number, message, text = json.loads(reply[1:])
        if number == NO_EXCEPTION:
            raise SolutionExit(message)
        raise EXCEPTIONS[number](*plain_data.decode(text))

    solution.__name__ = solution.__qualname__ = name
    try:
        statements = ast.parse(asserts, "tests.py").body
        programs = [compile(ast.Module([statement], []), "tests.py", "exec") for statement in statements]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return send("X" + describe(error))
    functions = {node.name for node in statements if isinstance(node, ast.FunctionDef)}
    are_tests = [is_test(statement, functions) for statement in statements]
    ask(f"N{sum(are_tests)}")
    namespace = {"__name__": "tests", name: solution}
    random.seed(asserts)  # as the fork left it, the stream would be the solution's too
    for program, is_one in zip(programs, are_tests, strict=True):
        try:
            exec(program, namespace)
        except BaseException as error:
            ask(("E" if is_one else "Q") + describe(error))
        else:
            if is_one:
                ask("P")
    return send("D")


class SolutionExit(BaseException):
    """Raised in the tests where the solution raised what is no Exception, such as SystemExit."""


def is_test(statement: ast.stmt, functions: set[str]) -> bool:
    """True for an assert, a loop or the like with one in it, and a call of one of the functions."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return isinstance(statement.value.func, ast.Name) and statement.value.func.id in functions
    defines = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    return not defines and any(isinstance(node, ast.Assert) for node in ast.walk(statement))


def serve_program(lines: Iterable[str], send: Send, code: str) -> None:
    """Execute the code as a program, then send "R", or "E" and the exception that ended it."""
    # The files of the warm interpreter know that they were made for /dev/null.
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout)
    reply = "R"
    try:
        execute_as_module(code, "__main__")
    except SystemExit as request:
        if request.code is not None and request.code != 0:
            reply = "E" + describe(request)
    except BaseException as error:
        reply = "E" + describe(error)
    end_program()
    send(reply)


def end_program() -> None:
    """Do what the interpreter does at its end. A step that fails does not keep back the output of others."""
    first_stdout: Any = sys.__stdout__

    def clear_main() -> None:
        sys.stdout = first_stdout
        vars(sys.modules["__main__"]).clear()  # files left open are written out

    end_threads, end_functions = vars(threading)["_shutdown"], vars(atexit)["_run_exitfuncs"]
    flushes = [lambda: sys.stdout.flush(), lambda: first_stdout.flush()]
    for step in (end_threads, end_functions, *flushes, clear_main, *flushes):
        with contextlib.suppress(Exception):
            step()


def execute_as_module(code: str, name: str) -> types.ModuleType:
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = "solution.py"
    exec(compile(code, "solution.py", "exec"), vars(module))
    return module


def describe(error: BaseException) -> str:
    """An exception as JSON: the number of the nearest built-in one, a message for the reader, its args."""
    kinds = (kind for kind in type(error).__mro__ if kind in EXCEPTIONS)
    number = next((EXCEPTIONS.index(kind) for kind in kinds), NO_EXCEPTION)
    try:
        message = f"{type(error).__name__}: {error}"[:MESSAGE_CHARS]
        arguments = plain_data.encode(list(error.args))
    except BaseException:  # its own __str__ may do anything
        message, arguments = f"{type(error).__name__}"[:MESSAGE_CHARS], "[]"
    return json.dumps([number, message, arguments if len(arguments) < MAX_ARGUMENTS_CHARS else "[]"])


if __name__ == "__main__":
    main()
