"""Programs for the code sandbox: attacks that must earn nothing, honest ones that must pass.

All are tested against the same function, in each form of tests. The forged ones do not compute it. An escape
computes it only if what it attempts worked, so that passing proves a leak. Nothing here needs pytest: the
tests of an ordinary user execute this file alone.
"""

import json
import os
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor


def answer(x: int) -> int:
    """What f is to return: not to be guessed, and written in no program but the honest ones."""
    return x * 7919 % 1009


ARGUMENTS = (3, 0, 57)
ANSWER = "x * 7919 % 1009"
MARKER = f"/tmp/left_by_an_attack_{os.getpid()}"
KEPT = os.environ.get("KEPT", f"/tmp/to_be_kept_{os.getpid()}")  # a file that no attack may touch
TESTS = {
    "calls": {"entry_point": "f", "calls": [{"args": [x], "expected": answer(x)} for x in ARGUMENTS]},
    "asserts": {
        "entry_point": "f",
        "asserts": "\n".join(f"assert f({x}) == {answer(x)}" for x in ARGUMENTS)
        + f"\ndef check(candidate):\n    assert candidate(11) == {answer(11)}\ncheck(f)",
    },
    "stdio": {"stdio": [{"stdin": f"{x}\n", "stdout": f"{answer(x)}\n"} for x in ARGUMENTS]},
}

# Forged results

EVERYWHERE = """
import os
def everywhere(text):
    for descriptor in range(40):
        try:
            os.set_blocking(descriptor, False)
            os.write(descriptor, text.encode())
        except OSError:
            pass
"""
RIGHT_LINES = "".join(f"R{answer(x)}\n" for x in ARGUMENTS)
FORGED = {
    "equals everything": """
class Same:
    __eq__ = __ge__ = __le__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __bool__ = lambda self: True
    __hash__ = lambda self: 0
    __index__ = __int__ = __abs__ = __add__ = __radd__ = lambda self, *other: 0
    __str__ = __repr__ = lambda self: ""
    __class__ = int
def f(x): return Same()
if __name__ == "__main__": print(Same())
""",
    "int subclass": """
class Same(int):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = int.__hash__
def f(x): return Same(1)
""",
    "float, string, list and dict subclasses": """
def same(kind): return type(kind.__name__, (kind,), {"__eq__": lambda *_: True, "__hash__": lambda _: 0})
kinds = [same(kind) for kind in (float, str, list, dict, tuple)]
def f(x): return kinds[x % 5]()
""",
    "subclasses that lie when they are read": """
import itertools
class Liar:
    __eq__ = __contains__ = lambda *_: True
    __hash__ = __len__ = lambda self: 0
    __index__ = __int__ = __pos__ = __add__ = __radd__ = lambda *_: 0
    __str__ = __repr__ = __format__ = lambda *_: "0"
    __iter__ = lambda self: itertools.repeat(0)
    __getitem__ = lambda self, key: 0
    keys = items = values = copy = __iter__
    __class__ = int
kinds = [type(kind.__name__, (Liar, kind), {}) for kind in (int, str, list, dict, tuple)]
def f(x): return kinds[x % 5](1 if x % 5 == 0 else ())
""",
    "metaclass": """
class Meta(type):
    __eq__ = lambda self, other: True
    __hash__ = type.__hash__
    __instancecheck__ = lambda self, other: True
class f(metaclass=Meta):
    def __new__(cls, x): return cls
""",
    "exit 0": "import sys\nsys.exit(0)",
    "exit 0 in the function": "import sys\ndef f(x): sys.exit(0)\nif __name__ == '__main__': f(0)",
    "os._exit(0)": "import os\ndef f(x): os._exit(0)\nif __name__ == '__main__': f(0)",
    "exit and quit": "def f(x): exit()\nif __name__ == '__main__': quit()",
    "atexit": EVERYWHERE + "import atexit\n"
    "atexit.register(lambda: (everywhere('R\\nP\\nD\\n'), os._exit(0)))\ndef f(x): raise SystemExit(0)",
    "patched built-ins": """
import builtins
yes = lambda *a, **k: True
for name in ("all", "any", "isinstance", "bool", "abs", "eq", "compile", "eval", "AssertionError"):
    setattr(builtins, name, yes)
builtins.__build_class__ = yes
def f(x): return None
""",
    "patched modules": """
import sys, types
def patch(module):
    for name, value in list(vars(module).items()):
        if isinstance(value, types.FunctionType):
            try:
                setattr(module, name, lambda *a, **k: "R1")
            except Exception:
                pass
def f(x):
    for name in ("plain_data", "isolation", "__main__", "json", "json.encoder", "unittest", "operator"):
        if name in sys.modules: patch(sys.modules[name])
    return 1
""",
    "the harness's own functions": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for name, value in list(frame.f_globals.items()):
            if callable(value) and name not in ("f",):
                frame.f_globals[name] = lambda *a, **k: None
        frame = frame.f_back
    return None
""",
    "frame walk": """
import sys
def f(x):
    frame, found = sys._getframe().f_back, []
    while frame:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if type(value) is dict and "expected" in value: return value["expected"]
            if type(value) in (list, tuple):
                found += [v for v in value if type(v) is int and 0 <= v < 1009]
        frame = frame.f_back
    return found[0] if found else None
""",
    "garbage collector": """
import gc
def f(x):
    for thing in gc.get_objects():
        if type(thing) is dict and thing.get("args") == [x] and "expected" in thing: return thing["expected"]
        if type(thing) in (list, tuple):
            for item in thing:
                if type(item) is str and "assert f(" in item:
                    return int(item.split(f"f({x}) == ")[1].split()[0])
""",
    "memory": """
import ctypes
def f(x):
    needles = [b"assert " + b"f(%d) == " % x, b'"expec' + b'ted"']
    for start in range(id(needles) - 2 ** 22, id(needles) + 2 ** 22, 4096):
        try:
            block = ctypes.string_at(start, 4096)
        except Exception:
            continue
        for needle in needles:
            if needle in block: return int(block.split(needle)[1].split()[0])
""",
    "markers on every descriptor": EVERYWHERE
    + "def f(x):\n    everywhere('PASS\\nOK\\nR\\nP\\nP\\nP\\nP\\nD\\n')\n    return 0",
    "markers when loaded": EVERYWHERE + "everywhere('R\\nR0\\nP\\nD\\n')\ndef f(x): return 0",
    "replies in advance": EVERYWHERE + f"everywhere('R\\n' + {RIGHT_LINES!r})\nimport time\ntime.sleep(60)",
    "replies in advance, in the function": EVERYWHERE
    + f"def f(x):\n    everywhere({RIGHT_LINES!r})\n    return 0",
    "replies from a thread": EVERYWHERE
    + """
import threading, time
def flood():
    while True:
        everywhere("R0\\n")
        time.sleep(0.001)
threading.Thread(target=flood, daemon=True).start()
def f(x):
    time.sleep(0.05)
    return 1
""",
    "malformed replies": EVERYWHERE
    + """
texts = ["R{\\n", "E\\n", "E[1]\\n", "E[99, 5]\\n", "\\0\\n", "R" + "[" * 5000 + "\\n", "\\xff\\n", "\\n"]
texts = iter(texts * 9)
def f(x):
    everywhere(next(texts))
    import time
    time.sleep(0.1)
""",
    "bytes that are no text": """
import os
def f(x):
    os.write(3, b"R\\xff\\xfe\\x80" + b"\\n")
    import time
    time.sleep(0.1)
""",
    "redefined checks": """
import builtins
def check(*args): pass
def test(*args): return True
assert_equal = assertEqual = solution = check
builtins.check = check
def f(x): return None
""",
    "shadowed names": "range = len = int = str = print = lambda *a: 0\ndef f(x): return len(x)",
    "test libraries": """
import sys, types, unittest
unittest.TestCase.assertEqual = lambda *a: None
sys.modules["pytest"] = sys.modules["_pytest"] = types.ModuleType("pytest")
def f(x): return None
""",
    "raises AssertionError": "def f(x): raise AssertionError",
    "raises StopIteration": "def f(x): raise StopIteration(x)",
    "raises GeneratorExit": "def f(x): raise GeneratorExit",
    "raises KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "an exception that lies": """
class AssertionError(Exception):
    def __str__(self): return "R"
    __repr__ = __str__
    __mro__ = ()
AssertionError.__name__ = AssertionError.__qualname__ = "\\nP\\nP"
def f(x): raise AssertionError
""",
    "an exception whose text exits": """
import os
class Error(Exception):
    def __str__(self): os._exit(0)
def f(x): raise Error
""",
    "no answer": "def f(x): pass",
    "a generator": "def f(x): yield 1",
    "itself": "def f(x): return f",
    "not a number": "def f(x): return float('nan')\nif __name__ == '__main__': print('nan')",
    "prefix of the output": f"print('{str(answer(3))[:1]}', end='')\ndef f(x): return [1]",
    "all answers at once": "for i in range(1009): print(i)\ndef f(x): return list(range(1009))",
    "output, then an error": "def f(x): return 1\nprint(1)\nraise ValueError",
    "closed channel": "import os\nos.closerange(0, 99)\ndef f(x): return 1",
    "dup of one descriptor over all": """
import os
for descriptor in range(0, 9):
    try: os.dup2(1, descriptor)
    except OSError: pass
def f(x): return 1
""",
    "syntax error": "def f(x: return",
    "null byte": "def f(x):\n    return '\0'",
    "nothing": "",
}

# Escapes: act() returns something true if it worked

ESCAPE = """
import ctypes, os, platform, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(x86_64, aarch64, *arguments):
    number = {"x86_64": x86_64, "aarch64": aarch64}[platform.machine()]
    libc.syscall.restype = ctypes.c_long
    return libc.syscall(ctypes.c_long(number), *[
        ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]) >= 0
def is_open(descriptor):
    try: return os.fstat(descriptor)
    except OSError: return None
def act():
%s
try:
    worked = act()
except BaseException:
    worked = False
def f(x): return %s if worked else None
if __name__ == "__main__":
    x = int(input())
    print(f(x))
"""
ACTS = {
    "read /etc/passwd": "return open('/etc/passwd').read()",
    "read this file": f"return open({os.path.abspath(__file__)!r}).read()",
    "read through ..": "return open('../' * 20 + 'etc/passwd').read()",
    "list the root": "return set(os.listdir('/')) & {'etc', 'proc', 'home', 'dev'}",
    "read /proc/self/environ": "return open('/proc/self/environ').read() or 1",
    "read /proc/1/cmdline": "return open('/proc/1/cmdline').read() or 1",
    "open /proc/self/mem": "return open('/proc/self/mem', 'rb')",
    "open /dev/zero": "return open('/dev/zero', 'rb')",
    "import a third-party package": "import site\nsys.path += ['/usr/lib/python3/dist-packages', "
    "os.path.dirname(os.__file__) + '/site-packages']\nimport pip\nreturn True",
    "the environment": "return os.environ or os.popen('env').read()",
    "write a file": f"return open({MARKER!r}, 'w').write('x')",
    "write beside the standard library": "return open(os.path.dirname(os.__file__) + '/os.py', 'a')",
    "write where anybody may": f"return open({MARKER.replace('/tmp', '/dev/shm')!r}, 'w')",
    "create with O_TMPFILE": "return os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    "truncate while reading": "return os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "truncate": "os.truncate(os.__file__, 0)\nreturn True",
    "delete": f"os.unlink({KEPT!r})\nreturn True",
    "rename": f"os.rename({KEPT!r}, {MARKER!r})\nreturn True",
    "make a folder": f"os.mkdir({MARKER!r})\nreturn True",
    "make a link": f"os.symlink('/etc/passwd', {MARKER!r})\nreturn True",
    "change a mode": f"os.chmod({KEPT!r}, 0)\nreturn True",
    "change a time": f"os.utime({KEPT!r}, (0, 0))\nreturn True",
    "memfd_create": "return os.memfd_create('x') >= 0",
    "shared memory": "import multiprocessing.shared_memory as m\nreturn m.SharedMemory(create=True, size=9)",
    "System V shared memory": "return call(29, 194, 4242, 4096, 0o1666)",
    "a message queue": "return call(68, 186, 4242, 0o1666)",
    "internet socket": "return socket.socket()",
    "unix socket": "return socket.socket(socket.AF_UNIX)",
    "datagram socket pair": "return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "netlink socket": "return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "connect": "return socket.create_connection(('127.0.0.1', 22), 1)",
    "fork": "if os.fork() == 0: os._exit(0)\nreturn True",
    "posix_spawn": "return os.posix_spawn('/bin/true', ['true'], {})",
    "subprocess": "import subprocess\nreturn subprocess.run(['true']).returncode == 0",
    "shell": "return os.system('true') == 0",
    "execv": "os.execv(sys.executable, ['python', '-c', 'print(1)'])",
    "clone in raw": "return call(56, 220, signal.SIGCHLD, 0, 0, 0, 0)",
    "clone3 in raw": "return call(435, 435, bytes(32) + b'\\x11' + bytes(31), 64)",
    "vfork in raw": "return call(58, 9999, 0)",
    "signal the parent": "os.kill(os.getppid(), signal.SIGTERM)\nreturn True",
    "signal everybody": "os.kill(-1, signal.SIGTERM)\nreturn True",
    "signal itself": "os.kill(os.getpid(), signal.SIGSTOP)\nreturn True",
    "signal the group": "os.killpg(0, signal.SIGTERM)\nreturn True",
    "signal by thread": "return call(200, 130, 1, signal.SIGTERM) or call(234, 131, 1, 1, signal.SIGTERM)",
    "signal by owner of a socket": "import fcntl\nreturn fcntl.fcntl(socket.socketpair()[0], 8, 1) == 0",
    "ptrace": "return call(101, 117, 0, 0, 0, 0)",
    "read another process": "return call(310, 270, os.getppid(), 0, 0, 0, 0, 0)",
    "open a process": "return call(434, 434, 1, 0)",
    "new namespaces": "return call(272, 97, 0x10000000)",
    "mount": "return call(165, 40, b'none', b'/', b'tmpfs', 0, 0)",
    "change the root": "return call(161, 51, b'/')",
    "change the folder": "os.chdir('/')\nreturn True",
    "machine code": "import mmap\nreturn mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | 32, prot=7)",
    "shared pages": "import mmap\nreturn mmap.mmap(-1, 4096)",
    "descriptors for itself": "return call(436, 436, 1000, 1001, 2)",
    "out-of-band byte": "return socket.socketpair()[0].send(b'x', socket.MSG_OOB)",
    "flags for the next job": "import fcntl\nif fcntl.fcntl(2, 3) & os.O_APPEND: return True\n"
    "fcntl.fcntl(2, 4, os.O_APPEND)",
    "machine code later": "return call(10, 226, id(act) & ~4095, 4096, 7)",
    "a C library": "return ctypes.CDLL('libcrypt.so.1') or ctypes.CDLL('libssl.so.3')",
    "io_uring": "return call(425, 425, 1, ctypes.create_string_buffer(120))",
    "bpf": "return call(321, 280, 0, 0, 0)",
    "keyring": "return call(250, 219, 0, -3, 1)",
    "prctl": "return call(157, 167, 4, 0, 0, 0, 0)",
    "personality": "return call(135, 92, 0x0400000)",
    "userfaultfd": "return call(323, 282, 0)",
    "become root": "os.setuid(0)\nreturn True",
    "be root": "return os.geteuid() == 0",
    "a higher limit": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))\nreturn True",
    "a higher priority": "os.nice(-5)\nreturn True",
    "another core": "os.sched_setaffinity(0, {0})\nreturn True",
    "the host's name": "socket.sethostname('x')\nreturn True",
    "descriptors of others": "return [d for d in range(4, 1024) if is_open(d)]",
    "the next job": "import builtins\nif hasattr(builtins, 'left'): return True\nbuiltins.left = 1",
}
ESCAPES = {name: ESCAPE % (textwrap.indent(body, "    "), ANSWER) for name, body in ACTS.items()}

# Exhaustion: must end in time, and leave the machine as it was

EXHAUSTING = {
    "endless loop": "while True: pass",
    "endless loop in C": "sum(range(10 ** 15))",
    "endless power": "9 ** 9 ** 9",
    "endless pattern": "import re\nre.match('(a+)+$', 'a' * 50 + 'b')",
    "sleep": "import time\ntime.sleep(1000)",
    "ignored signals": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "catches everything": """
while True:
    try:
        while True: pass
    except BaseException: pass
""",
    "stopped": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": """
import threading, time
threading.stack_size(32768)
while True:
    try: threading.Thread(target=time.sleep, args=(99,)).start()
    except RuntimeError: pass
""",
    "memory": "x = []\nwhile True: x.append(bytearray(10 ** 7))",
    "memory at once": "x = bytearray(10 ** 12)",
    "memory as a list": "x = [0] * 10 ** 11",
    "memory mapped": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 24, flags=34))",
    "memory that outlives its mapping": """
import mmap
kept = []
while True:
    pages = mmap.mmap(-1, 100 << 20)
    for i in range(0, len(pages), 4096): pages[i] = 1
    pages.resize(4096)
    kept.append(pages)
""",
    "memory in pipes": """
import os, fcntl
held = []
while True:
    try:
        r, w = os.pipe()
        os.set_blocking(w, False)
        held.append((r, w))
        while os.write(w, bytes(1 << 16)): pass
    except OSError: pass
""",
    "memory in sockets": """
import socket
held = []
while True:
    try:
        held.append(socket.socketpair())
        held[-1][0].setblocking(False)
        while held[-1][0].send(bytes(1 << 16)): pass
    except OSError: pass
""",
    "endless output": "while True: print('x' * 10000)",
    "endless output on every descriptor": EVERYWHERE + "while True: everywhere('x' * 10000)",
    "endless line on the channel": "import os\nwhile True: os.write(3, b'x' * 10000)",
    "huge reply": "def f(x): return 'x' * 10 ** 8\nif __name__ == '__main__': print(f(0))",
    "huge exception": "raise ValueError('x' * 10 ** 8)",
    "nested reply": """
x = []
for _ in range(10 ** 5): x = [x]
def f(_): return x
""",
    "reply that contains itself": "x = []\nx.append(x)\ndef f(_): return x",
    "reply that doubles": "x = 1\nfor _ in range(100): x = [x, x]\ndef f(_): return x",
    "nested source": "x = " + "(" * 5000 + ")" * 5000,
    "source that folds": "x = " + "-" * 50000 + "1",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x + 1)\nf(0)",
    "deep recursion in C": "x = None\nfor _ in range(10 ** 6): x = {'x': x}\nrepr(x)",
    "crash": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "never exits": """
import atexit, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
atexit.register(time.sleep, 1000)
""",
}

# Honest programs: each defines f, and answers standard input as a program

MAIN = "if __name__ == '__main__':\n    print(f(int(input())))\n"
HONEST = {
    "plain": f"def f(x): return {ANSWER}\n" + MAIN,
    "recursion": "def f(x): return 0 if x == 0 else (f(x - 1) + 7919) % 1009\n" + MAIN,
    "deep recursion": f"""
import sys
sys.setrecursionlimit(10 ** 6)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
def f(x): return {ANSWER} if depth(30000) == 30000 else None
"""
    + MAIN,
    "class": """
class Solver:
    factor = 7919
    def __init__(self, x): self.x = x
    @property
    def value(self): return self.x * self.factor % 1009
def f(x): return Solver(x).value
"""
    + MAIN,
    "generator": "def terms(x):\n    for _ in range(x): yield 7919\ndef f(x): return sum(terms(x)) % 1009\n"
    + MAIN,
    "common imports": f"""
import abc, array, bisect, collections, contextlib, copy, csv, dataclasses, datetime, decimal, enum, fractions
import functools, hashlib, heapq, io, itertools, json, logging, math, operator, os, pprint, queue, random, re
import statistics, string, struct, sys, textwrap, threading, time, typing, unittest, uuid, zlib
import difflib, graphlib, html, ipaddress, numbers, pickle, secrets, types, unicodedata, urllib.parse, weakref
import xml.etree.ElementTree
from typing import Dict, List, Optional
@functools.lru_cache(maxsize=None)
def f(x: int) -> int:
    counts = collections.Counter("abracadabra")
    assert counts.most_common(1) == [("a", 5)] and json.loads("[1]") == [1] and math.gcd(12, 18) == 6
    assert random.random() < 1 and datetime.datetime.now().year > 2000 and hashlib.sha256(b"").digest()
    assert decimal.Decimal("0.1") * 3 == decimal.Decimal("0.3") and re.sub("a", "b", "aa") == "bb"
    assert pickle.loads(pickle.dumps([x])) == [x] and time.perf_counter() > 0
    return {ANSWER}
"""
    + MAIN,
    "dataclass with deferred annotations": """
from __future__ import annotations
from dataclasses import dataclass, field
import enum
@dataclass
class Point:
    x: int
    rest: list[int] = field(default_factory=list)
class Colour(enum.Enum):
    RED = 1
def f(x): return Point(x).x * 7919 % 1009 if Colour.RED.value else None
"""
    + MAIN,
    "prints and messages": f"""
import sys
def f(x):
    print("working on", x, file=sys.stderr, flush=True)
    return {ANSWER}
"""
    + MAIN,
    "main guard": f"def f(x): return {ANSWER}\ndef main(): print(f(int(input())))\n"
    "if __name__ == '__main__': main()",
    "asks at the end": f"def f(x): return {ANSWER}\ntry: print(f(int(input())))\nexcept EOFError: pass",
    "reads all of standard input": f"""
import sys
def f(x): return {ANSWER}
if __name__ == "__main__":
    sys.stdout.write("\\n".join(str(f(int(line))) for line in sys.stdin))
    sys.stdout.write("\\n")
""",
    "reads bytes": f"""
import sys, os
def f(x): return {ANSWER}
if __name__ == "__main__":
    x = int(sys.stdin.buffer.readline())
    os.write(1, b"%d\\n" % f(x))
    sys.exit()
""",
    "reads descriptor 0": f"def f(x): return {ANSWER}\n"
    "if __name__ == '__main__': print(*map(f, map(int, open(0))))",
    "exit at the end": f"def f(x): return {ANSWER}\n" + MAIN + "    exit()",
    "main thread with a larger stack": f"""
import sys, threading
def f(x): return {ANSWER}
def main(): print(f(int(input())))
if __name__ == "__main__":
    threading.stack_size(1 << 26)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
""",
    "threads": f"""
from concurrent.futures import ThreadPoolExecutor
def f(x):
    with ThreadPoolExecutor(4) as pool: return list(pool.map(lambda x: {ANSWER}, [x] * 8))[0]
"""
    + MAIN,
    "many threads": f"""
import threading, time
def f(x):
    threads = [threading.Thread(target=time.sleep, args=(0.05,)) for _ in range(20)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return {ANSWER}
"""
    + MAIN,
    "standard output wrapped anew": f"""
import io, sys
def f(x): return {ANSWER}
if __name__ == "__main__":
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8")
    print(f(int(input())))
""",
    "standard output detached": f"""
import io, sys
def f(x): return {ANSWER}
if __name__ == "__main__":
    sys.stdout = io.TextIOWrapper(sys.stdout.detach())
    print(f(int(input())))
""",
    "standard output closed and opened anew": f"""
import os, sys
def f(x): return {ANSWER}
if __name__ == "__main__":
    sys.stdout.close()
    sys.stdout = os.fdopen(1, "w")
    print(f(int(input())))
""",
    "fast output": f"""
import io, os, sys
class FastOutput(io.IOBase):
    def __init__(self): self.text = ""
    def write(self, text): self.text += text
    def flush(self): self.text = self.text[os.write(1, self.text.encode()) :]
def f(x): return {ANSWER}
if __name__ == "__main__":
    sys.stdout = FastOutput()
    print(f(int(input())))
""",
    "prints at the end": f"""
import sys
class Last:
    def __del__(self): print(self.text)
def f(x): return {ANSWER}
if __name__ == "__main__":
    last, sys.stdout = Last(), open(1, "w", closefd=False)
    last.text = f(int(input()))
""",
    "files left open": f"""
def f(x): return {ANSWER}
if __name__ == "__main__":
    output = open(1, "w")
    output.write(str(f(int(input()))))
""",
    "asyncio": f"""
import asyncio
async def work(x):
    await asyncio.sleep(0.001)
    return {ANSWER}
def f(x): return asyncio.run(work(x))
"""
    + MAIN,
    "100 MB and half a second": f"""
import time
def f(x):
    memory = bytearray(100 * 2 ** 20)
    memory[:: 4096] = bytes(len(memory[:: 4096]))
    time.sleep(0.5 / 3)
    return {ANSWER}
"""
    + MAIN,
    "catches errors": f"""
def f(x):
    try: return [][x]
    except IndexError as error: return {ANSWER}
    finally: pass
"""
    + MAIN,
    "caught memory error": f"""
def f(x):
    try: bytearray(10 ** 13)
    except MemoryError: return {ANSWER}
"""
    + MAIN,
    "global state": f"calls = []\ndef f(x):\n    calls.append(x)\n    return {ANSWER}\n" + MAIN,
    "closure and decorator": f"""
import functools
def twice(function):
    @functools.wraps(function)
    def wrapper(*args): return function(*args) and function(*args)
    return wrapper
@twice
def f(x): return {ANSWER}
"""
    + MAIN,
    "lambda": f"f = lambda x: {ANSWER}\n" + MAIN,
    "match": "def f(x):\n    match [x]:\n        case [int(y)]: return y * 7919 % 1009\n" + MAIN,
    "unicode": "def f(x):\n    naïve = 'é' * x\n    return len(naïve) * 7919 % 1009\n" + MAIN,
    "byte order mark": f"\ufeffdef f(x): return {ANSWER}\n" + MAIN,
    "rare modules": """
import grp, sqlite3
def f(x):
    assert b"\\x1b$B" in "\u3042".encode("iso2022_jp")
    return sqlite3.connect(":memory:").execute("select ? * 7919 % 1009", (x,)).fetchone()[0]
"""
    + MAIN,
    "windows line ends": f"def f(x):\r\n    return {ANSWER}\r\n" + MAIN.replace("\n", "\r\n"),
}


PROGRAMS = {"forged": FORGED, "escapes": ESCAPES, "exhausting": EXHAUSTING, "honest": HONEST}


def faults(kind: str, name: str, run_tests, forms=tuple(TESTS)) -> list[str]:
    """What is wrong with the results of one program, in these forms of tests."""
    passes, timeout_s = kind == "honest", 0.5 if kind == "exhausting" else 20.0
    with ThreadPoolExecutor(len(forms)) as threads:
        results = threads.map(lambda form: run_tests(PROGRAMS[kind][name], TESTS[form], timeout_s), forms)
    wrong = [(form, r) for form, r in zip(forms, results, strict=True) if (r.status == "pass") != passes]
    return [f"{name}, {form}: {result}" for form, result in wrong]


def main(layers: str, *kinds: str) -> None:
    """Run these kinds of programs with these layers alone, on this interpreter, as this user."""
    from gspo.sandbox import check_machine, processes, run_tests

    processes.LAYERS = tuple(layers.split(","))
    forms = {kind: tuple(TESTS) for kind in kinds} | {"escapes": ("calls",)}  # they act before any test
    found = [faults(kind, name, run_tests, forms[kind]) for kind in kinds for name in PROGRAMS[kind]]
    states = check_machine()
    print(json.dumps({"programs": len(found), "faults": sum(found, [])} | states))


if __name__ == "__main__":
    main(*sys.argv[1:])
