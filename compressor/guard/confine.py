"""What holds a child, on Linux: limits, no network, and a filter of system calls."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import platform
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
NEW_USER, NEW_NET = 0x10000000, 0x40000000
X86_64 = 0xC000003E

RESULT, OPEN = 3, 64
"""The descriptor of the result, and how many a child may have."""

CALLS = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21,
    "sched_yield": 24, "mremap": 25, "msync": 26, "madvise": 28, "dup": 32, "nanosleep": 35,
    "getpid": 39, "exit": 60, "uname": 63, "fcntl": 72, "ftruncate": 77, "getdents": 78,
    "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
    "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204,
    "getdents64": 217, "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262,
    "readlinkat": 267, "faccessat": 269, "set_robust_list": 273, "getcpu": 309, "getrandom": 318,
    "membarrier": 324, "statx": 332, "rseq": 334, "faccessat2": 439,
}  # fmt: skip
"""System calls of x86-64 that a child may make freely: what reading files into memory takes."""


def confine(descriptor: int, *, seconds: float, memory: int, result: int) -> None:
    """Gives up, for good, what reading a file does not need.

    ``seconds`` of CPU time and ``memory`` bytes on top of what is taken now; ``descriptor``, which
    may grow to ``result`` bytes, becomes :data:`RESULT`, and all others are closed.
    """
    import resource

    os.setsid()  # what it might start is killed with it
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(descriptor, RESULT)
    os.closerange(RESULT + 1, 1 << 20)
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    for limit, most in {
        resource.RLIMIT_AS: taken * resource.getpagesize() + memory,
        resource.RLIMIT_CPU: math.ceil(seconds),
        resource.RLIMIT_FSIZE: result,
        resource.RLIMIT_NOFILE: OPEN,
        resource.RLIMIT_CORE: 0,
    }.items():
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # At the hard limit of CPU time comes SIGKILL, which says nothing; above it SIGXCPU.
        spare = 1 if limit == resource.RLIMIT_CPU and most != hard else 0
        resource.setrlimit(limit, (most, most + spare))
    with suppress(OSError):  # if memory runs out, it is the child that goes
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    if filtering():
        rules = _rules(os.getpid())
        packed = b"".join(struct.pack("=HBBI", *rule) for rule in rules)
        program = ctypes.create_string_buffer(packed)
        held = struct.pack("@HxxxxxxP", len(rules), ctypes.addressof(program))
        _prctl(PR_SET_SECCOMP, 2, ctypes.create_string_buffer(held))


def _prctl(option: int, value: int, given: Any = None) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, given, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def off_the_network() -> bool:
    """Moves this process into a network of its own that leads nowhere, where that is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    return any(libc.unshare(flags) == 0 for flags in (NEW_NET, NEW_USER | NEW_NET))


def filtering() -> bool:
    """Whether system calls can be filtered here: Linux on x86-64, as :data:`CALLS` are its."""
    if platform.machine() != "x86_64" or sys.byteorder != "little" or sys.maxsize < 1 << 32:
        return False
    try:
        _prctl(PR_SET_SECCOMP, 2)
    except OSError as error:  # where it can, it asks for a program
        return error.errno == errno.EFAULT
    return False


def _rules(process: int) -> list[tuple[int, int, int, int]]:
    """The filter, as instructions of classic BPF ``(code, jump if true, if false, operand)``.

    All but :data:`CALLS` fail with ``EPERM``. ``clone3`` is unknown, so that threads are started
    with ``clone``, whose flags a filter can see. Source: ``Documentation/userspace-api/
    seccomp_filter.rst`` of the kernel.
    """
    load, equal, any_of, give = 0x20, 0x15, 0x45, 0x06
    allow, deny, kill = 0x7FFF0000, 0x00050000, 0x80000000
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    rules = [
        (load, 0, 0, 4),
        (equal, 1, 0, X86_64),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        (equal, 0, 1, 435),
        (give, 0, 0, deny | errno.ENOSYS),
    ]
    for call, argument, test, value, fits in (
        (2, 1, any_of, writing, False),  # open
        (257, 2, any_of, writing, False),  # openat
        (56, 0, any_of, 0x10000, True),  # clone: threads only
        (234, 0, equal, process, True),  # tgkill: abort() signals its own process
    ):
        rules += [
            (equal, 0, 4, call),
            (load, 0, 0, 16 + 8 * argument),
            (test, 0, 1, value),
            (give, 0, 0, allow if fits else deny | errno.EPERM),
            (give, 0, 0, deny | errno.EPERM if fits else allow),
        ]
    for call in CALLS.values():
        rules += [(equal, 0, 1, call), (give, 0, 0, allow)]
    return [*rules, (give, 0, 0, deny | errno.EPERM)]
