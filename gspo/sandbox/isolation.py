"""The Linux kernel's means against untrusted code, through ctypes: namespaces, landlock, seccomp, limits.

`enter_namespaces` and `restrict_files` act on the process that calls them and on all that it forks later.
`drop_privileges` is the last step before a process runs untrusted code. None of it needs a privilege or
anything installed; root becomes nobody first. OSError: the kernel does not allow the step.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import stat
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
# The column of the tables of system calls. -1: the sandbox does not work on this architecture.
ARCHITECTURE = {"x86_64": 0, "aarch64": 1}.get(platform.machine(), -1)
NOBODY = 65534
FIRST_OWN_USER = 2**31  # ids that the kernel knows, and that no system gives to anybody
HIDDEN = ("site-packages", "dist-packages")  # in the standard library's folder, but not of it


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _call(function: Callable[..., int], *arguments: Any) -> int:
    """Call a variadic C function with its integers as longs; ctypes alone would pass ints."""
    longs = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return function(*longs)


def _prctl(option: int, *arguments: Any) -> None:
    _check(_call(_libc.prctl, option, *(*arguments, 0, 0, 0, 0)[:4]), f"prctl {option}")


# Namespaces: no network, no other processes, and a file system that holds only the folders asked for

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
PIVOT_ROOT = (155, 41)
ROOT_FOLDER = "/tmp"  # in the new mount namespace alone, the new root is mounted over it


def become_nobody() -> None:
    """Give up root's user id, and its capabilities with it.

    The new id is random, so that what the kernel limits per user, such as threads, is for this sandbox alone.
    It is nobody's where the user namespace does not have so many ids.
    """
    own_user = FIRST_OWN_USER + int.from_bytes(os.urandom(3), "big")
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    try:
        os.setresuid(own_user, own_user, own_user)
    except OSError:
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # Otherwise /proc/self, which the user namespace's id map is written to, stays root's.
    _prctl(PR_SET_DUMPABLE, 1)


def enter_namespaces() -> int:
    """Enter new user, process, mount, network, IPC and UTS namespaces. Returns a descriptor for
    fork_into_pid_namespace.

    The new file system holds the current folder alone, under its own path and read-only; what is HIDDEN in it
    appears empty. (This user may not be able to reach the folder by its path.) The caller goes on in a child
    process, which dies with its parent. The parent only waits, with no descriptors but the standard ones.
    """
    folder = os.getcwd()
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    _check(_libc.unshare(flags), "unshare")
    if child := os.fork():  # only a child is in the new process namespace
        try:
            os.closerange(3, 1 << 20)
            os.waitpid(child, 0)
        finally:
            os._exit(0)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    own_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)

    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", ROOT_FOLDER, "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=755")
    inside = ROOT_FOLDER + folder
    os.makedirs(inside)
    _mount(".", inside, None, MS_BIND)
    # A mount that comes from another user namespace keeps its flags, and a remount must name them.
    kept = os.statvfs(inside).f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_NOATIME)
    _mount("none", inside, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)
    for hidden in HIDDEN:
        if os.path.isdir(f"{inside}/{hidden}"):
            _mount("tmpfs", f"{inside}/{hidden}", "tmpfs", MS_RDONLY, "size=4k,mode=555")
    os.chdir(ROOT_FOLDER)
    _check(_call(_libc.syscall, PIVOT_ROOT[ARCHITECTURE], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")
    _mount("none", "/", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    return own_namespace


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    kind_bytes = kind.encode() if kind else None
    done = _libc.mount(source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), options.encode())
    _check(done, f"mount {target}")


def fork_into_pid_namespace(own_namespace: int) -> int:
    """Fork a child that is process 1 of a process namespace of its own. Returns as os.fork.

    own_namespace: what enter_namespaces returned. When the child ends, the kernel kills whatever else runs in
    its namespace.
    """
    _check(_libc.unshare(CLONE_NEWPID), "unshare")
    pid = os.fork()
    if pid:  # only from its own namespace may a process make the next one
        _check(_libc.setns(own_namespace, CLONE_NEWPID), "setns")
    return pid


# Landlock: which files can be opened

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
READ_FILE, READ_DIR = 1 << 2, 1 << 3
FILE_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # number of rights that the version knows
NETWORK_RIGHTS, SCOPES = 0b11, 0b11  # bind and connect (from 4); abstract sockets and signals (from 6)


def landlock_version() -> int:
    """The version of landlock. OSError: this kernel has none, or it is switched off."""
    version = _call(_libc.syscall, LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    return _check(version, "landlock")


def rules_to_read(paths: Iterable[str]) -> int:
    """Returns a descriptor for restrict_files. It allows opening these paths and what is in them, to read."""
    version = landlock_version()
    rights = (1 << FILE_RIGHTS_BY_ABI[min(version, 5)]) - 1
    known = 8  # bytes of the structure that this version knows
    if version >= 4:
        known = 16
    if version >= 6:
        known = 24
    rules = struct.pack("QQQ", rights, NETWORK_RIGHTS, SCOPES)[:known]
    ruleset = _check(_call(_libc.syscall, LANDLOCK_CREATE_RULESET, rules, len(rules), 0), "landlock")
    for path in paths:
        descriptor = os.open(path, os.O_PATH)
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        rule = struct.pack("=Qi", READ_FILE | READ_DIR if is_folder else READ_FILE, descriptor)
        done = _call(_libc.syscall, LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
        os.close(descriptor)
        _check(done, "landlock rule")
    return ruleset


def restrict_files(rules: int) -> None:
    """Put the rules of rules_to_read in force, for good, and close their descriptor."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _check(_call(_libc.syscall, LANDLOCK_RESTRICT_SELF, rules, 0), "landlock")
    os.close(rules)


# Seccomp: which system calls there are

# Numbers on x86-64 and aarch64, from the kernel's tables; None: the architecture does not have the call.
ALLOWED: dict[str, tuple[int, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "close": (3, 57), "lseek": (8, 62),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "stat": (4, None), "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "getdents64": (217, 61),
    "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441), "eventfd2": (290, 19), "shutdown": (48, 210),
    "getsockopt": (55, 209), "getsockname": (51, 204), "getpeername": (52, 205),
    "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "getitimer": (36, 102), "setitimer": (38, 103),
    "alarm": (37, None), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "futex": (202, 98), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "rseq": (334, 293),
    "set_tid_address": (218, 96), "membarrier": (324, 283), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173),
    "getpgrp": (111, None), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getgroups": (115, 158), "getrusage": (98, 165), "getrlimit": (97, 163),
    "getrandom": (318, 278), "uname": (63, 160), "sysinfo": (99, 179), "exit": (60, 93),
    "exit_group": (231, 94),
}  # fmt: skip
PROT_EXEC, MAP_TYPE, MAP_PRIVATE = 0x4, 0xF, 0x2
THREAD = 0x10400  # CLONE_THREAD and CLONE_FILES: no process, and no table of descriptors of its own
MSG_OOB, MSG_HARMLESS = 0x1, 0x4040  # MSG_DONTWAIT, MSG_NOSIGNAL
IOCTLS = (0x5421, 0x5450, 0x5451)  # FIONBIO, FIONCLEX, FIOCLEX
WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)
ALL = 2**64 - 1
# Calls that depend on their arguments: alternatives, each a list of (argument, mask, value under the mask).
CONDITIONAL: dict[str, tuple[tuple[int, int | None], list[list[tuple[int, int, int]]]]] = {
    # No new machine code; and shared pages, which would outlive their mapping, escape the memory limit.
    "mmap": ((9, 222), [[(2, PROT_EXEC, 0), (3, MAP_TYPE, MAP_PRIVATE)]]),
    "mprotect": ((10, 226), [[(2, PROT_EXEC, 0)]]),
    "open": ((2, None), [[(1, WRITING, 0)]]),
    "openat": ((257, 56), [[(2, WRITING, 0)]]),
    "clone": ((56, 220), [[(0, THREAD, THREAD)]]),
    "close_range": ((436, 436), [[(2, ALL, 0)]]),
    "socketpair": ((53, 199), [[(0, ALL, 1), (1, 0xF, 1)]]),  # AF_UNIX, SOCK_STREAM: asyncio wakes itself so
    "sendto": ((44, 206), [[(3, ALL & ~MSG_HARMLESS, 0), (4, ALL, 0)]]),  # to the socket's peer, no address
    "recvfrom": ((45, 207), [[(3, MSG_OOB, 0)]]),
    "prlimit64": ((302, 261), [[(2, ALL, 0)]]),  # reading the limits
    # Not F_SETOWN and F_SETSIG: with them the kernel sends a signal of one's choice to another process.
    "fcntl": ((72, 25), [[(1, ALL, command)] for command in (0, 1, 2, 3, 4, 1030)]),
    "ioctl": ((16, 29), [[(1, ALL, command)] for command in IOCTLS]),
}
CLONE3 = (435, 435)  # its flags lie in memory; where there is no such call, the C library takes clone

SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
AUDIT_ARCH = (0xC000003E, 0xC00000B7)
BPF_LOAD, BPF_AND, BPF_JUMP_IF_EQUAL, BPF_RETURN = 0x20, 0x54, 0x15, 0x06
NUMBER_OFFSET, ARCHITECTURE_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16  # in struct seccomp_data


def seccomp_filter(architecture: int) -> bytes:
    """The filter's program, 8 bytes per instruction.

    Each is a struct sock_filter: code, jump if true, jump if false, operand.
    """

    def instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, operand)

    def for_call(number: int, then: bytes) -> bytes:
        return instruction(BPF_JUMP_IF_EQUAL, number, 0, len(then) // 8) + then

    def allow_if(conditions: list[tuple[int, int, int]]) -> bytes:
        block = allow
        for argument, mask, value in reversed(conditions):
            for half in (1, 0):  # operands have 32 bits
                mask_half, value_half = (mask >> 32 * half) & 0xFFFFFFFF, (value >> 32 * half) & 0xFFFFFFFF
                if mask_half:
                    load = instruction(BPF_LOAD, ARGUMENTS_OFFSET + 8 * argument + 4 * half)
                    block = (
                        load
                        + instruction(BPF_AND, mask_half)
                        + instruction(BPF_JUMP_IF_EQUAL, value_half, 0, len(block) // 8)
                        + block
                    )
        return block

    allow, refuse = instruction(BPF_RETURN, SECCOMP_RET_ALLOW), SECCOMP_RET_ERRNO | errno.EPERM
    program = instruction(BPF_LOAD, ARCHITECTURE_OFFSET)
    program += instruction(BPF_JUMP_IF_EQUAL, AUDIT_ARCH[architecture], 1, 0)
    program += instruction(BPF_RETURN, SECCOMP_RET_KILL_PROCESS)
    program += instruction(BPF_LOAD, NUMBER_OFFSET)
    for numbers in ALLOWED.values():
        number = numbers[architecture]
        if number is not None:
            program += for_call(number, allow)
    for numbers, alternatives in CONDITIONAL.values():
        number = numbers[architecture]
        if number is not None:
            blocks = b"".join(allow_if(conditions) for conditions in alternatives)
            program += for_call(number, blocks + instruction(BPF_RETURN, refuse))
    no_such_call = instruction(BPF_RETURN, SECCOMP_RET_ERRNO | errno.ENOSYS)
    program += for_call(CLONE3[architecture], no_such_call)
    return program + instruction(BPF_RETURN, refuse)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _restrict_calls(program: bytes) -> None:
    pointer = ctypes.byref(_Program(len(program) // 8, program))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer)


# Limits and capabilities

STACK_BYTES = 64 * 2**20  # deep recursion
MAX_DESCRIPTORS = 32
CAPABILITY_VERSION_3 = 0x20080522
CAPSET = (126, 91)


def drop_privileges(program: bytes, memory_bytes: int, max_threads: int) -> None:
    """Limit this process, tie its life to its parent's, give up its capabilities, filter its system calls.

    program: what seccomp_filter returned. memory_bytes: address space. max_threads: threads of this user, in
    its user namespace.
    """
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_STACK: STACK_BYTES,
        resource.RLIMIT_NOFILE: MAX_DESCRIPTORS,
        resource.RLIMIT_NPROC: max_threads,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for which, limit in limits.items():
        hard = resource.getrlimit(which)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))
    header, nothing = struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    _check(_call(_libc.syscall, CAPSET[ARCHITECTURE], header, nothing), "capset")
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(PR_SET_DUMPABLE, 0)  # no core dump, by whatever the host does with them; closed to its neighbours
    _restrict_calls(program)
