"""The warm interpreter of the code sandbox: isolated once, forked for each process that runs untrusted code.

    python zygote.py CONTROL LAYERS     started by runner.py; CONTROL is a socket's descriptor

No text of a job passes through this process: the sandbox hands over descriptors, and the forked child reads
and writes them. So a child's memory, a copy of this one, holds nothing of another job. What a child does
depends on the first line that it reads:

    ["solution", code, name, form]   run the code, then call its function `name` with each line of arguments;
                                     form: how the results are written, "encode" or "comparable"
    ["tests", asserts, name]         run the tests, for whom the function is a call to the other process
    ["program", code]                run the code as __main__, with the test's stdin and stdout
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
from collections.abc import Callable
from pathlib import Path

import isolation
import plain_data

LIBRARY = os.path.dirname(os.__file__)
CHANNEL = 3  # the child's descriptor of its socket to the sandbox
MESSAGE_CHARS = 300
MAX_THREADS = 32  # of a sandbox that has its user to itself
MAX_THREADS_OF_USER = 1024  # where all that the caller's user runs counts
THREAD_STACK_BYTES = 8 * 2**20  # else it is the caller's limit, which may be beyond memory_mb
MAX_ARGUMENTS_CHARS = 10_000  # of an exception
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
# What a call of the solution may raise in the tests, by number, so that a name proves nothing. Not among them
# is what ends a loop in silence: all(map(f, cases)) would hold if f raised StopIteration.
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
    signal.signal(
        signal.SIGCHLD, signal.SIG_DFL
    )  # the caller may ignore it, and then no child can be waited for
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather a job than the training it serves
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
        if not message:  # the sandbox is gone
            return
        order = json.loads(message)
        if "end" in order:
            control.sendall(json.dumps({"statuses": end(order["end"], order["grace_s"])}).encode())
            continue
        pid = fork()
        if pid == 0:
            max_threads = MAX_THREADS if alone else MAX_THREADS_OF_USER
            limits = {"memory_bytes": own_memory + order["memory_mb"] * 2**20, "max_threads": max_threads}
            become_child(*descriptors, seccomp, limits)
        for descriptor in descriptors:
            os.close(descriptor)
        control.sendall(json.dumps({"pid": pid}).encode())


def end(pids: list[int], grace_s: float) -> list[int | None]:
    """Reap children; None for one that had to be killed, because it did not end by itself within grace_s."""
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
    """What a program finds: the standard library, common modules loaded, no environment, fixed seeds."""
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
    layers, fork, rules = {"namespaces": "not wanted", "landlock": "not wanted"}, os.fork, None

    @contextlib.contextmanager
    def trying(layer: str):
        try:
            yield
        except OSError as error:
            layers[layer] = error.strerror

    if "landlock" in wanted:
        with trying("landlock"):  # by root, whose files another user may not reach by their paths
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


def become_child(stdin: int, output: int, nowhere: int, channel: int, seccomp: bytes, limits: dict[str, int]):
    """Wire the descriptors up, close everything else, give up all rights, and do what the first line says."""
    moved = [os.dup(descriptor) for descriptor in (stdin, output, nowhere, channel)]
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
    {"solution": serve_solution, "tests": run_tests, "program": run_program}[role](lines, send, *arguments)
    os._exit(0)


def serve_solution(lines, send, code: str, name: str, form: str) -> None:
    write = {"encode": plain_data.encode, "comparable": plain_data.comparable}[form]
    try:
        function = getattr(run_as_module(code, "solution"), name)
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


def run_tests(lines, send, asserts: str, name: str) -> None:
    """In lockstep: "N" and the number of tests, then for each "P" or "E" and why not, then "D".

    In between, "C" and arguments for each call of the solution. "X" and why: these are no tests, whatever the
    solution. "Q" and why: a statement between the tests failed.
    """

    def ask(text: str) -> str:
        send(text)
        return lines.readline()

    def solution(*arguments, **keywords):
        try:
            request = "C" + plain_data.encode((list(arguments), keywords))
        except TypeError as error:  # not ValueError: the solution may have returned what is nested too deeply
            request = "X" + describe(error)  # at which the sandbox ends this process
        reply = ask(request)
        if reply[:1] == "R":
            return plain_data.decode(reply[1:])
        number, message, text = json.loads(reply[1:])
        raise (
            SolutionExit(message) if number == NO_EXCEPTION else EXCEPTIONS[number](*plain_data.decode(text))
        )

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
    """The solution's process raised what is no Exception, such as SystemExit."""


def is_test(statement: ast.stmt, functions: set[str]) -> bool:
    """An assert, a loop or the like with one in it, or a call of one of the functions, such as check(f)."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return isinstance(statement.value.func, ast.Name) and statement.value.func.id in functions
    defines = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    return not defines and any(isinstance(node, ast.Assert) for node in ast.walk(statement))


def run_program(lines, send, code: str) -> None:
    # Those of the warm interpreter know that they were made for /dev/null.
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.__stdin__, sys.__stdout__ = sys.stdin, sys.stdout
    reply = "R"
    try:
        run_as_module(code, "__main__")
    except SystemExit as request:
        if request.code is not None and request.code != 0:
            reply = "E" + describe(request)
    except BaseException as error:
        reply = "E" + describe(error)
    end_program()
    send(reply)


def end_program() -> None:
    """What the interpreter does at its end, where a step that fails does not keep back the others' output."""

    def clear_main() -> None:
        sys.stdout = sys.__stdout__
        vars(sys.modules["__main__"]).clear()  # files left open are written out

    flushes = [lambda: sys.stdout.flush(), lambda: sys.__stdout__.flush()]
    for step in (threading._shutdown, atexit._run_exitfuncs, *flushes, clear_main, *flushes):
        with contextlib.suppress(Exception):
            step()


def run_as_module(code: str, name: str) -> types.ModuleType:
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = "solution.py"
    exec(compile(code, "solution.py", "exec"), vars(module))
    return module


def describe(error: BaseException) -> str:
    """As JSON: the number of the nearest built-in exception, a message for the reader, the args."""
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
