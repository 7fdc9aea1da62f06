"""Untrusted code: attacks earn nothing and leave nothing, honest programs pass, failures are not results."""

import json
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from gspo.sandbox import SandboxError, isolation, processes, run_tests, runner
from support import ROOT, attacks
from support.attacks import ARGUMENTS, MARKER, PROGRAMS, TESTS, answer, faults
from support.sandbox import needs_sandbox

KEPT = Path(attacks.KEPT)

pytestmark = needs_sandbox


def calls(*pairs) -> dict:
    """Tests of f: (argument, expected) pairs."""
    return {"entry_point": "f", "calls": [{"args": [arg], "expected": expected} for arg, expected in pairs]}


def idle_sandboxes() -> list:
    return processes.idle_sandboxes(os.getpid())


def close_idle_sandboxes() -> None:
    """The next job starts one. How many there were depends on how the jobs before it overlapped."""
    for sandbox in idle_sandboxes():
        sandbox.close()
    idle_sandboxes().clear()


def children_of(pid: int) -> list[int]:
    parents = {int(path.name): parent_of(path) for path in Path("/proc").glob("[0-9]*")}
    return [child for child, parent in parents.items() if parent == pid]


def parent_of(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # ended meanwhile
        return None


def processes_of(sandbox) -> list[int]:
    """The processes that the sandbox's interpreter has forked and not reaped."""
    (interpreter,) = children_of(sandbox.interpreter.pid)  # in its own process namespace
    return children_of(interpreter)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left():
    """No attack of this file leaves a file, a process or a descriptor, or touches a file."""
    KEPT.write_text("kept")
    close_idle_sandboxes()
    run_tests("", TESTS["calls"])
    before, descriptors = KEPT.stat(), len(os.listdir("/proc/self/fd"))
    yield
    assert KEPT.read_text() == "kept"
    assert (KEPT.stat().st_mode, KEPT.stat().st_mtime) == (before.st_mode, before.st_mtime)
    KEPT.unlink()
    assert not os.path.lexists(MARKER) and not os.path.lexists(MARKER.replace("/tmp", "/dev/shm"))
    run_tests("", TESTS["calls"])
    assert [processes_of(sandbox) for sandbox in idle_sandboxes()] == [[]] * len(idle_sandboxes())
    close_idle_sandboxes()
    run_tests("", TESTS["calls"])
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in PROGRAMS for name in PROGRAMS[kind]])
def test_attacks_earn_nothing_and_honest_programs_pass(kind, name):
    started = time.monotonic()
    assert faults(kind, name, run_tests) == []
    if kind == "exhausting":
        assert time.monotonic() - started < 0.5 + 5  # on a busy machine


@pytest.fixture
def open_folder():
    """A folder that every user can read, which tmp_path is not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize("layers", ["namespaces,landlock", "namespaces", "landlock"])
def test_as_an_ordinary_user_and_with_each_layer_alone(layers, open_folder):
    """By a user without privileges, with an interpreter that this user may run.

    What a layer keeps in or lets through are escapes and honest programs. Forged results do not depend on it.
    """
    user = os.getuid() or 1234
    kinds = ["forged", "escapes", "honest"] if "," in layers else ["escapes", "honest"]
    done = run_elsewhere(open_folder, ["attacks.py", layers, *kinds], user)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["user"] == f"id {user}" and report["faults"] == [] and report["programs"] > 100
    assert [name for name in ("namespaces", "landlock") if report[name] == "on"] == layers.split(",")


def run_elsewhere(folder: Path, arguments: list[str], user: int) -> subprocess.CompletedProcess:
    """Run a program beside the sandbox's modules, with an interpreter that an ordinary user may run."""
    pythons = [python for python in (sys.executable, "/usr/bin/python3") if runs(python, os.getuid() or 1234)]
    if not pythons:
        pytest.skip("no interpreter of Python 3.11 or later that another user may run")
    shutil.copytree(ROOT / "gspo" / "sandbox", folder / "gspo" / "sandbox")
    shutil.copy(ROOT / "gspo" / "__init__.py", folder / "gspo")
    shutil.copy(ROOT / "tests" / "support" / "attacks.py", folder)
    return subprocess.run(
        [pythons[0], *arguments], cwd=folder, user=user, env={"KEPT": str(KEPT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def runs(python: str, user: int) -> bool:
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([python, "-c", check], user=user, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("result, expected, equal", [
    ("0", False, False), ("1", True, False), ("1.0", 1, False), ("1", 1.0, False), ("True", True, True),
    ("[1]", (1,), False), ("(1,)", (1,), True), ("{1}", {1}, True), ("{1}", frozenset({1}), False),
    ("{'b': 1, 'a': 2}", {"a": 2, "b": 1}, True), ("{1: 'a'}", {True: "a"}, False),
    ("-0.0", 0.0, True), ("float('nan')", float("nan"), True), ("0.1 + 0.2", 0.3, False),
    ("10 ** 40", 10**40, True), ("b'x'", b"x", True), ("'\\ud800'", "\ud800", True), ("None", None, True),
    ("[[1, 2], [3]]", [[1, 2], [3]], True),
    ("range(2)", [0, 1], False), ("'a'", b"a", False), ("1j", 1j, True),
])  # fmt: skip
def test_results_are_compared_strictly(result, expected, equal):
    verdict = run_tests(f"def f(x): return {result}", calls((0, expected)))
    assert (verdict.status == "pass") == equal, verdict


SUBCLASSES = """
from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import Enum, IntEnum
class Size(IntEnum): SMALL = 1
class Colour(str, Enum): RED = "red"
class Plain(Enum): ONE = 1
class Lying(int): __eq__ = __ne__ = lambda self, other: True; __hash__ = __int__ = __index__ = lambda self: 42
class Claims: __class__ = int; __index__ = __int__ = lambda self: 1
class Pretends(dict): items = keys = lambda self: iter([("a", 1)]); __getitem__ = lambda self, key: 1
Point = namedtuple("Point", "x y")
"""


@pytest.mark.parametrize("result, expected, equal", [
    ("Counter('a')", {"a": 1}, True), ("Counter('ab')", {"a": 1}, False), ("Size.SMALL", 1, True),
    ("Size.SMALL", True, False), ("Size.SMALL", 1.0, False), ("Colour.RED", "red", True),
    ("Plain.ONE", 1, False), ("OrderedDict(b=1, a=[Size.SMALL])", {"a": [1], "b": 1}, True),
    ("Point(1, 2)", (1, 2), True),
    ("defaultdict(list, a=[])", {"a": []}, True), ("Point(1, 2)", [1, 2], False), ("Lying(7)", 7, True),
    ("Lying(7)", 42, False), ("Lying(7)", 8, False), ("Claims()", 1, False), ("Pretends()", {"a": 1}, False),
    ("Pretends()", {}, True), ("{Lying(2), Lying(1)}", {1}, False), ("{Lying(1): 0, 1.0: 0}", {1: 0}, False),
])  # fmt: skip
def test_a_result_of_a_subclass_counts_as_its_plain_part(result, expected, equal):
    code = f"{SUBCLASSES}\ndef f(x): return {result}"
    given = run_tests(code, calls((0, expected)))
    assert (given.status == "pass") == equal, given


@pytest.mark.parametrize("code, form, passed, status", [
    ("def f(x): return x * 7919 % 1009", "calls", 3, "pass"),
    ("def f(x): return x * 7919 % 1009", "asserts", 4, "pass"),
    ("def f(x): return 0", "calls", 1, "fail"),
    ("def f(x): return 0", "asserts", 1, "fail"),
    ("print(0)", "stdio", 1, "fail"),
    ("def f(x): return 1 // x and x * 7919 % 1009", "calls", 0, "fail"),
    ("def f(x): 1 / 0", "calls", 0, "error"),
    ("def f(x): 1 / 0", "asserts", 0, "error"),
    ("def g(x): pass", "calls", 0, "error"),
    ("f = 3", "calls", 0, "error"),
    ("{}[1]", "calls", 0, "error"),
    ("def f(x", "stdio", 0, "error"),
    ("print(0); exit(1)", "stdio", 0, "error"),
    ("def f(x):\n    while x: pass\n    return 0", "asserts", 0, "timeout"),
    ("def f(x):\n    while x < 9: pass", "calls", 0, "timeout"),
    ("def f(x): return bytearray(10 ** 10)", "calls", 0, "memory"),
    ("x = bytearray(10 ** 10)", "stdio", 0, "memory"),
    ("import os\ndef f(x): os.abort()", "calls", 0, "crash"),
    ("import os\nos.abort()", "stdio", 0, "crash"),
    ("while True: print('x' * 999)", "stdio", 0, "output_limit"),
    ("def f(x): return 'x' * 10 ** 7", "asserts", 0, "output_limit"),
])  # fmt: skip
def test_statuses(code, form, passed, status):
    result = run_tests(code, TESTS[form], timeout_s=1.0)
    assert (result.passed, result.total, result.status) == (passed, 4 if form == "asserts" else 3, status)
    assert bool(result.detail) == (status != "pass") and result.detail.isprintable()


def test_a_crash_in_one_stdio_test_leaves_the_others():
    code = "import os\nx = int(input())\nos.abort() if x == 3 else print(x * 7919 % 1009)"
    result = run_tests(code, TESTS["stdio"])
    assert (result.passed, result.total, result.status) == (2, 3, "crash")


def test_arguments_arrive_as_they_were_sent():
    argument = {"b": [1, 2.5, None], "a": {"deep": (1, {2})}, 3: b"x"}
    tests = {
        "entry_point": "f",
        "calls": [{"args": [argument], "kwargs": {"y": 1}, "expected": repr(argument)}],
    }
    assert run_tests("def f(x, y): return repr(x)", tests).status == "pass"
    mutating = "def f(x):\n    x.append(1)\n    return len(x)"
    assert run_tests(mutating, calls(([], 1), ([], 1))).status == "pass"


def test_asserts_see_copies_and_exceptions():
    asserts = (
        "xs = [3, 1, 2]\nassert f(xs) == sorted(xs)\nassert xs == [3, 1, 2]\n"
        "try:\n    f(None)\nexcept TypeError as error:\n    seen = str(error)\nassert seen == 'None'\n"
    )
    tests = {"entry_point": "f", "asserts": asserts}
    function = "def f(x):\n    if x is None: raise TypeError('None')\n"
    assert run_tests(function + "    return sorted(x)", tests).passed == 3
    assert run_tests(function + "    x.clear()\n    return []", tests).status == "fail"
    named = "class TypeError(Exception): pass\n" + function + "    return [1, 2, 3]"
    result = run_tests(named, tests)  # a class of that name is not the built-in one
    assert (result.passed, result.status) == (2, "error")


def test_nothing_that_a_function_raises_ends_the_loops_of_the_tests():
    asserts = (
        "assert all(map(f, [1, 2]))\nassert [*map(f, [1])] == []\nfor x in map(f, [1]): pass\nassert False"
    )
    tests = {"entry_point": "f", "asserts": asserts}
    for kind in ("StopIteration", "StopAsyncIteration", "GeneratorExit", "type('E', (StopIteration,), {})"):
        assert run_tests(f"def f(x): raise {kind}", tests).passed == 0
    # A forged reply with any number for the exception; the same call answers the requests that follow.
    forged = """
import os, re
def f(number):
    while True:
        os.write(3, b'E[%d, "", "[]"]\\n' % int(number))
        number = re.search(rb"-?\\d+", os.read(3, 1000)).group()
"""
    numbers = [*range(99), *range(-99, 0)]
    asserts = "\n".join(f"assert [*map(f, [{number}])] == []" for number in numbers)
    result = run_tests(forged, {"entry_point": "f", "asserts": asserts})
    assert (result.passed, result.total) == (0, len(numbers))
    assert result.status == "error" and "ArithmeticError" in result.detail  # the first number was understood


def test_what_fails_between_the_tests_is_not_paid_as_a_fraction():
    tests = {"entry_point": "f", "asserts": "assert f(3) == 14\nx = f(4) + 0\n"}
    result = run_tests("def f(x): return 14 if x == 3 else None", tests)
    assert (result.passed, result.total, result.status) == (0, 1, "error")
    loops = (
        "import random\nrandom.seed(1)\nprint('x')\nassert f(3) == 14\nfor x in [4]:\n    assert f(x) == 20\n"
    )
    result = run_tests("def f(x): return 14", {"entry_point": "f", "asserts": loops})
    assert (result.passed, result.total, result.status) == (1, 2, "fail")


def test_what_the_tests_draw_is_not_what_the_code_draws():
    """As in HumanEval/38, whose decoder could be one that draws its answer from the same stream."""
    draw = "''.join(choice(string.ascii_lowercase) for i in range(randint(10, 20)))"
    asserts = f"""
from random import randint, choice
import string
def encode(s): return s[::-1]
def check(candidate):
    for _ in range(100):
        str = {draw}
        assert candidate(encode(str)) == str
check(f)
"""
    tests = {"entry_point": "f", "asserts": asserts}
    forged = f"def f(s):\n    from random import randint, choice\n    import string\n    return {draw}"
    assert run_tests(forged, tests).status == "fail"
    assert run_tests("def f(s): return s[::-1]", tests).status == "pass"


def test_results_nested_too_deeply_are_the_codes_fault():
    code = "def f(x):\n    for _ in range(199): x = [x]\n    return x"
    assert run_tests(code, {"entry_point": "f", "asserts": "assert f([[f(0)]])"}).status == "error"


def test_the_data_of_tests_may_be_large():
    count = 330_000  # of fourteen bytes: more than MAX_REPLY_BYTES
    returned = {"args": [count], "expected": list(range(10**12, 10**12 + count))}
    code = "def f(a): return list(range(10 ** 12, 10 ** 12 + a))"
    assert run_tests(code, {"entry_point": "f", "calls": [returned]}).passed == 1
    returned = {"args": [5], "expected": ["x" * 10**6] * 5}
    code = "def f(a): return ['x' * 10 ** 6] * "
    assert run_tests(code + "a", {"entry_point": "f", "calls": [returned]}).passed == 1
    assert run_tests(code + "(2 * a)", {"entry_point": "f", "calls": [returned]}).status == "output_limit"
    tests = {"entry_point": "f", "asserts": "assert f(['x' * 10 ** 6] * 5) == 5"}
    assert run_tests("def f(a): return len(a)", tests).status == "pass"


def test_a_large_exception_is_not_parsed():
    with pytest.raises(processes.ProcessEnded, match="no reply"):
        runner._raised("E" + json.dumps([0, "", "x" * 4 * 10**6]))
    longest = run_tests("def f(x): raise ValueError('\\U0001f600\\n' * 9**3)", calls((0, 0)))
    assert longest.detail.startswith("ValueError: \U0001f600")


def test_time_is_for_all_tests_and_a_deaf_process_costs_the_parent_nothing():
    started = time.monotonic()
    many = {"stdio": [{"stdin": "", "stdout": ""}] * 300}
    assert run_tests("while True: pass", many, timeout_s=0.5).status == "timeout"
    deaf = "import os, socket, time\ns = socket.socket(fileno=3)\ndef f(x):\n    s.shutdown(socket.SHUT_RD)\n"
    before = time.process_time()
    run_tests(deaf + "    os.write(3, b'R1\\n')\n    time.sleep(9)", calls((0, 1), (1, 1)), timeout_s=1.0)
    assert time.monotonic() - started < 4 and time.process_time() - before < 0.5


def test_stdio_ignores_white_space_at_the_ends_alone():
    tests = {"stdio": [{"stdin": "", "stdout": "1 2\n3\n"}]}
    for printed, same in (
        ("1 2 \\n3", True),
        ("1 2\\r\\n3\\n\\n", True),
        ("1  2\\n3", False),
        ("\\n1 2\\n3", False),
        ("1 2", False),
        ("1 2\\n3\\n3", False),
    ):
        assert (run_tests(f"print('{printed}', end='')", tests).status == "pass") == same


@pytest.mark.parametrize("tests, message", [
    ({}, "one of the keys"), (None, "one of the keys"), ([], "one of the keys"),
    ({"calls": [], "stdio": []}, "one of the keys"),
    ({"entry_point": "f", "calls": []}, "no calls"),
    ({"entry_point": "f", "calls": [{"args": [1]}]}, "args and expected"),
    ({"entry_point": "f", "calls": [{"args": 1, "expected": 1}]}, "args and expected"),
    ({"entry_point": "f", "calls": [{"args": [object()], "expected": 1}]}, "args and expected"),
    ({"entry_point": "f", "calls": ["x"]}, "args and expected"),
    ({"calls": [{"args": [], "expected": 1}]}, "entry_point"),
    ({"entry_point": "f()", "asserts": "assert f()"}, "entry_point"),
    ({"entry_point": "f", "asserts": ["assert f()"]}, "string"),
    ({"entry_point": "f", "asserts": "assert f("}, "SyntaxError"),
    ({"entry_point": "f", "asserts": "x = 1"}, "no tests"),
    ({"entry_point": "f", "asserts": "f()"}, "no tests"),
    ({"entry_point": "f", "asserts": "assert f()\ntry: f(range(2))\nexcept: 0"}, "range is not plain"),
    ({"entry_point": "f", "asserts": "assert f(key=lambda: 0) == 1"}, "function is not plain data"),
    ({"entry_point": "f", "asserts": "assert f()\nreturn 1"}, "SyntaxError"),
    ({"entry_point": "class", "asserts": "assert f()"}, "entry_point"),
    ({"entry_point": "f", "calls": [{"args": {"x": 1}, "expected": 1}]}, "args must be a list"),
    ({"entry_point": "f", "calls": [{"args": [], "kwargs": None, "expected": 1}]}, "args must be a list"),
    ({"entry_point": "f", "calls": [{"args": [], "kwargs": {1: 2}, "expected": 1}]}, "args and expected"),
    ({"stdio": []}, "no test"), ({"stdio": [{"stdin": "x"}]}, "stdin and stdout"),
])  # fmt: skip
def test_malformed_tests_are_a_value_error(tests, message):
    with pytest.raises(ValueError, match=message):
        run_tests("def f(): return 1", tests)


@pytest.mark.parametrize(
    "arguments", [(None,), ("", 0.0), ("", float("nan")), ("", float("inf")), ("", 1.0, 0)]
)
def test_impossible_limits_are_a_value_error(arguments):
    code, *limits = arguments
    with pytest.raises(ValueError, match="must be a string"):
        run_tests(code, TESTS["calls"], *limits)


def test_limits_may_be_fractions():
    assert run_tests("def f(x): return 1", calls((0, 1)), timeout_s=2.5, memory_mb=100.5).status == "pass"


def test_a_killed_sandbox_is_replaced_and_two_failures_are_an_error(monkeypatch):
    os.killpg(idle_sandboxes()[-1].interpreter.pid, signal.SIGKILL)
    honest = "def f(x): return x * 7919 % 1009"
    assert run_tests(honest, TESTS["calls"]).status == "pass"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    close_idle_sandboxes()
    with pytest.raises(SandboxError, match="2 times"):
        run_tests(honest, TESTS["calls"])
    monkeypatch.undo()
    assert run_tests(honest, TESTS["calls"]).status == "pass"


def test_a_process_killed_from_outside_is_no_verdict():
    sandbox = idle_sandboxes()[-1]

    def kill_it():
        while not processes_of(sandbox):
            time.sleep(0.01)
        os.kill(processes_of(sandbox)[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_it, daemon=True)
    killer.start()
    result = run_tests("import time\ntime.sleep(1)\ndef f(x): return x * 7919 % 1009", TESTS["calls"])
    assert result.status == "pass" and not killer.is_alive()  # at the second attempt


def test_memory_that_the_kernel_takes_back_each_time_is_the_codes_fault(monkeypatch):
    monkeypatch.setattr(
        processes.Sandbox, "end", lambda sandbox, pids, grace_s: [-signal.SIGKILL] * len(pids)
    )
    result = run_tests("import os\nos._exit(0)", TESTS["calls"])
    assert (result.passed, result.status) == (0, "memory")


@pytest.mark.parametrize("before", [
    "signal.signal(signal.SIGCHLD, signal.SIG_IGN)", "os.close(0); os.close(1)",
    "resource.setrlimit(resource.RLIMIT_STACK, (2 << 30, resource.getrlimit(resource.RLIMIT_STACK)[1]))",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))",
])  # fmt: skip
def test_callers_in_unusual_states(before, tmp_path):
    program = (
        f"import os, resource, signal, sys\n{before}\nfrom gspo.sandbox import run_tests\n"
        "tests = {'entry_point': 'f', 'calls': [{'args': [], 'expected': 1}]}\n"
        "code = 'import threading\\ndef f():\\n    threading.Thread(target=print).start()\\n    return 1'\n"
        "sys.exit(run_tests(code, tests).status != 'pass')"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


def test_an_idle_sandbox_holds_few_descriptors():
    run_tests("", TESTS["calls"])
    outer = idle_sandboxes()[-1].interpreter.pid
    assert len(os.listdir(f"/proc/{outer}/fd")) == 3
    assert len(os.listdir(f"/proc/{children_of(outer)[0]}/fd")) < 8


def test_a_thread_that_forks_meanwhile_does_not_hold_up_a_crash(monkeypatch):
    """The forked child has no end of a channel that it could keep open."""
    forked, make = [], os.memfd_create

    def fork():
        forked.append(os.fork())
        if forked == [0]:
            time.sleep(30)
            os._exit(0)

    def make_while_a_thread_forks(name):
        forker.start()
        forker.join(0.2)
        return make(name)

    forker = threading.Thread(target=fork)
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", make_while_a_thread_forks)
        result = run_tests("import os\ndef f(x): os.abort()", calls((0, 0)), timeout_s=2.0)
    forker.join()
    os.kill(forked[0], signal.SIGKILL)
    os.waitpid(forked[0], 0)
    assert result.status == "crash"


def test_a_job_that_takes_all_threads_leaves_others_theirs(open_folder):
    """Also without namespaces, if root starts it. As a program of its own: see the ordinary user's test."""
    if os.getuid():
        pytest.skip("without namespaces an ordinary user's threads are counted together")
    hog = """
import threading, time
def f(x):
    try:
        for _ in range(1100): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
    except RuntimeError: time.sleep(x)
    return threading.active_count() <= 32
"""
    program = f"""
import os, sys, threading, time
import attacks
from gspo.sandbox import processes, run_tests
processes.LAYERS = ("landlock",)
tests = {{"entry_point": "f", "calls": [{{"args": [1.5], "expected": True}}]}}
hog = threading.Thread(target=lambda: print(run_tests({hog!r}, tests, memory_mb=9000).status))
hog.start()
time.sleep(1)
print(run_tests(attacks.HONEST["many threads"], attacks.TESTS["calls"]).status, flush=True)
hog.join()
"""
    done = run_elsewhere(open_folder, ["-c", program], 0)
    assert done.stdout.split() == ["pass"] * 2, done.stderr


def test_without_protection_it_refuses(monkeypatch):
    monkeypatch.setattr(processes, "LAYERS", ())
    with pytest.raises(SandboxError, match="namespaces: .*; landlock: .*landlock .Linux 5.13"):
        processes.Sandbox()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(SandboxError, match="needs Linux"):
        processes.Sandbox()


def test_a_leak_found_by_the_probe_is_refused(monkeypatch):
    leaking = processes.PROBE.replace("open(host_file).read()", "1")
    monkeypatch.setattr(processes, "PROBE", leaking)
    with pytest.raises(SandboxError, match="possible to read a file"):
        processes.Sandbox()


def test_many_threads_and_a_forked_process():
    honest, results = "def f(x): return x * 7919 % 1009", []
    threads = [
        threading.Thread(target=lambda: results.append(run_tests(honest, TESTS["asserts"]).status))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["pass"] * 6
    pid = os.fork()
    if pid == 0:
        os._exit(0 if run_tests(honest, TESTS["calls"]).status == "pass" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert run_tests(honest, TESTS["calls"]).status == "pass"


def test_a_library_that_nobody_can_read_is_refused(monkeypatch):
    blind = processes.PROBE.replace('"colorsys"', '"not_a_module"')
    monkeypatch.setattr(processes, "PROBE", blind)
    with pytest.raises(SandboxError, match="cannot read the standard library in .*chmod"):
        processes.Sandbox()


def test_the_same_code_has_the_same_result():
    code = "import random\ndef f(x): return [random.random(), sorted(map(hash, 'abc')), list(set('hello'))]"
    details = set()
    for _ in range(2):
        details.add(run_tests(code, calls((0, 0))).detail)
        idle_sandboxes().pop().close()
    assert len(details) == 1


def test_the_command_line_says_what_protects_the_machine():
    done = subprocess.run(
        [sys.executable, "-m", "gspo.sandbox"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.count("possible") == 1  # to import from the library
    assert all(word in done.stdout for word in ("namespaces", "landlock", "read a file", "refused"))


# The filter of system calls, for both architectures, run as the kernel runs it


def verdict_of_filter(architecture: int, number: int, arguments=(), kernel_architecture=None) -> int:
    """The filter's return value for a system call."""
    kernel = isolation.AUDIT_ARCH[architecture] if kernel_architecture is None else kernel_architecture
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number, kernel, 0, *(argument % 2**64 for argument in padded))
    program = isolation.seccomp_filter(architecture)
    accumulator, position = 0, 0
    while True:
        code, if_true, if_false, operand = struct.unpack_from("=HBBI", program, 8 * position)
        position += 1
        if code == isolation.BPF_LOAD:
            accumulator = struct.unpack_from("<I", data, operand)[0]
        elif code == isolation.BPF_AND:
            accumulator &= operand
        elif code == isolation.BPF_JUMP_IF_EQUAL:
            position += if_true if accumulator == operand else if_false
        else:
            return operand


@pytest.mark.parametrize("architecture", [0, 1])
def test_seccomp_filter(architecture):
    allow, kill = isolation.SECCOMP_RET_ALLOW, isolation.SECCOMP_RET_KILL_PROCESS

    def allowed(name, *arguments) -> bool:
        table = isolation.ALLOWED | {k: v[0] for k, v in isolation.CONDITIONAL.items()}
        return verdict_of_filter(architecture, table[name][architecture], arguments) == allow

    assert all(allowed(name) for name, numbers in isolation.ALLOWED.items() if numbers[architecture])
    known = {n[architecture] for n in isolation.ALLOWED.values()}
    known |= {n[0][architecture] for n in isolation.CONDITIONAL.values()}
    assert not any(verdict_of_filter(architecture, n) == allow for n in range(600) if n not in known)
    assert verdict_of_filter(architecture, 0x40000000) != allow  # x32
    assert verdict_of_filter(architecture, 63, kernel_architecture=0x40000003) == kill  # 32 bits
    assert allowed("openat", -100, 1, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_ACCMODE, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE):
        assert not allowed("openat", -100, 1, flags)
    assert allowed("mmap", 0, 1, 3, 0x22) and not allowed("mmap", 0, 1, 5, 0x22)
    assert not allowed("mmap", 0, 1, 3, 0x21) and not allowed("mprotect", 0, 1, 4)
    assert allowed("clone", 0x3D0F00) and not allowed("clone", signal.SIGCHLD)
    assert not allowed("clone", 0x3D0F00 & ~0x400) and not allowed("close_range", 9, 9, 2)
    assert allowed("sendto", 3, 1, 1, 0x4040) and not allowed("sendto", 3, 1, 1, 1)
    assert allowed("recvfrom", 3, 1, 1, 0x40) and not allowed("recvfrom", 3, 1, 1, 0x41)
    assert allowed("prlimit64", 0, 7, 0) and not allowed("prlimit64", 0, 7, 1 << 32)
    assert allowed("sendto", 3, 1, 1, 0, 0) and not allowed("sendto", 3, 1, 1, 0, 1 << 40)
    assert allowed("socketpair", 1, 1 | 0o2000000) and not allowed("socketpair", 1, 2)
    assert not allowed("socketpair", 1 | 1 << 32, 1) and not allowed("socketpair", 2, 1)
    assert allowed("fcntl", 1, 3) and not any(
        allowed("fcntl", 1, command) for command in (8, 10, 15, 1024, 1033)
    )
    assert allowed("ioctl", 1, 0x5421) and not allowed("ioctl", 1, 0x5412)
    assert verdict_of_filter(architecture, 435) == isolation.SECCOMP_RET_ERRNO | 38


def test_the_answer_is_not_a_guess():
    assert len({answer(x) for x in ARGUMENTS}) == len(ARGUMENTS)
