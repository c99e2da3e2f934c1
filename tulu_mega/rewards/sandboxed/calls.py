"""The system calls that a confined process may make, as a seccomp filter: what is not listed is refused."""

from __future__ import annotations

import platform
import struct

# Architecture -> its audit number and its column in the tables below.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
EPERM, ENOSYS = 1, 38
_NEWER = 435
"""From this number on (clone3) C libraries ask for a call and take an older one where the kernel has none."""

# Number on x86_64 and aarch64 (None: there is none).
_ALLOWED = {
    # memory
    "brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "madvise": (28, 233),
    "msync": (26, 227), "mincore": (27, 232), "membarrier": (324, 283), "mseal": (462, 462),
    # files that Landlock lets it open, and what lies beneath its directory
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287), "lseek": (8, 62),
    "close": (3, 57), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "creat": (85, None),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43),
    "fstatfs": (138, 44), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37),
    "symlink": (88, None), "symlinkat": (266, 36), "ftruncate": (77, 46), "fadvise64": (221, 223),
    "fsync": (74, 82), "fdatasync": (75, 83), "sendfile": (40, 71), "copy_file_range": (326, 285), "umask": (95, 166),
    "getxattr": (191, 8), "lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12),
    "flistxattr": (196, 13),
    # pipes and waiting
    "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None),
    "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441), "eventfd": (284, None), "eventfd2": (290, 19),
    "timerfd_create": (283, 85), "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87),
    # a pair of sockets, which event loops need; sendto without an address and socketpair of one family are below
    "recvfrom": (45, 207), "shutdown": (48, 210), "getsockname": (51, 204), "getpeername": (52, 205), "getsockopt": (55, 209),
    # threads
    "futex": (202, 98), "futex_waitv": (449, 449), "set_robust_list": (273, 99), "get_robust_list": (274, 100),
    "set_tid_address": (218, 96), "gettid": (186, 178), "rseq": (334, 293), "arch_prctl": (158, None), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "sched_getparam": (143, 121), "sched_getscheduler": (145, 120), "getcpu": (309, 168),
    "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126), "getpriority": (140, 141),
    "exit": (60, 93), "exit_group": (231, 94), "restart_syscall": (219, 128),
    # signals to itself (kill and tgkill are below)
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pause": (34, None),
    "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103),
    # clocks
    "time": (201, None), "gettimeofday": (96, 169), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "times": (100, 153),
    # who and where it is
    "getpid": (39, 172), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158), "getpgrp": (111, None),
    "getpgid": (121, 155), "getsid": (124, 156), "capget": (125, 90), "uname": (63, 160), "sysinfo": (99, 179),
    "getrusage": (98, 165), "getrlimit": (97, 163), "setrlimit": (160, 164), "getrandom": (318, 278),
}  # fmt: skip

_OPEN, _OPENAT = (2, None), (257, 56)
_FCNTL, _IOCTL, _PRCTL, _PRLIMIT = (72, 25), (16, 29), (157, 167), (302, 261)
_CLONE, _KILL, _TKILL, _TGKILL = (56, 220), (62, 129), (200, 130), (234, 131)
_SOCKETPAIR, _SENDTO, _SETSOCKOPT, _CLOSE_RANGE = (53, 199), (44, 206), (54, 208), (436, 436)

_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)
"""Duplicates, flags, locks, the size of a pipe; without owners, signals, leases and notifications."""
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Is it a terminal and of what size, bytes to read, blocking or not, closed on exec or not."""
_PRCTL_COMMANDS = (15, 16, 0x53564D41)
"""A thread's name and a mapping's; so the signal at the parent's death stays."""
_AF_UNIX = 1
_SOCKET_OPTIONS = (2, 7, 8, 9, 13, 20, 21, 66, 67)
"""Buffers' sizes, lingering, time-outs; without filters for packets."""
_CLONE_THREAD, _CLONE_FILES, _CLONE_OTHER = 0x10000, 0x400, 0x7E022080
"""Threads, without new namespaces (the lowest bit is that of time) or tracing. All have one table of descriptors, which the
starter looks at."""
_CLOEXEC = 4
"""The flag of close_range that gives a thread no table of its own."""
_ACCESS_MODE, _O_TRUNC, _O_PATH = 3, 0o1000, 0o10000000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _GIVE = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _FAIL, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000


def seccomp_filter(pid: int) -> bytes | None:
    """Classic BPF over ``struct seccomp_data``: call number at 0, architecture at 4, arguments of 8 bytes from 16.

    Args:
        pid: the process that is to be confined, the only one that it may send signals to.

    Returns:
        the filter, or None where this machine's numbers are not known.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None or struct.calcsize("P") != 8:
        return None
    audit, column = machine
    allow, refuse = _step(_GIVE, _ALLOW), _step(_GIVE, _FAIL | EPERM)
    code = [_step(_LOAD, 4), _step(_EQUAL, audit, 1), _step(_GIVE, _KILL_PROCESS), _step(_LOAD, 0)]
    code += [_step(_AT_LEAST, 0x40000000, 0, 1), refuse]  # x86's second table of the same calls
    checks = [
        (_FCNTL, _one_of(1, _FCNTL_COMMANDS)),
        (_IOCTL, _one_of(1, _IOCTL_COMMANDS)),
        (_PRCTL, _one_of(0, _PRCTL_COMMANDS)),
        (_PRLIMIT, _one_of(0, (0,))),
        (_SOCKETPAIR, _one_of(0, (_AF_UNIX,))),
        (_KILL, _one_of(0, (pid,))),
        (_TGKILL, _one_of(0, (pid,))),
        (_TKILL, _one_of(0, (pid,))),  # the first thread's number is the process's
        (_SENDTO, [_argument(4), _step(_EQUAL, 0, 0, 3), _argument(4, high=True), _step(_EQUAL, 0, 0, 1), allow, refuse]),
        (
            _CLONE,
            [
                _argument(0),
                _step(_ANY_BIT, _CLONE_OTHER, 3),
                _step(_ANY_BIT, _CLONE_THREAD, 0, 2),
                _step(_ANY_BIT, _CLONE_FILES, 0, 1),
                allow,
                refuse,
            ],
        ),
        (_CLOSE_RANGE, _one_of(2, (0, _CLOEXEC))),
        (_SETSOCKOPT, _one_of(2, _SOCKET_OPTIONS)),
        (_OPEN, _no_truncation(1)),
        (_OPENAT, _no_truncation(2)),
    ]
    for numbers, steps in checks:
        if numbers[column] is not None:
            code += [_step(_EQUAL, numbers[column], 0, len(steps)), *steps]
    for numbers in _ALLOWED.values():
        if numbers[column] is not None:
            code += [_step(_EQUAL, numbers[column], 0, 1), allow]
    code += [_step(_AT_LEAST, _NEWER, 0, 1), _step(_GIVE, _FAIL | ENOSYS), refuse]
    return b"".join(code)


def _step(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, k)


def _argument(number: int, high: bool = False) -> bytes:
    """Load the lower (or upper) half of an argument; both machines have the lower half first."""
    return _step(_LOAD, 16 + 8 * number + 4 * high)


def _one_of(argument: int, values: tuple[int, ...]) -> list[bytes]:
    """Allow where the argument is one of the values. The kernel reads such arguments as 32 bits, and so does this."""
    tests = [_step(_EQUAL, value, len(values) - place) for place, value in enumerate(values)]
    return [_argument(argument), *tests, _step(_GIVE, _FAIL | EPERM), _step(_GIVE, _ALLOW)]


def _no_truncation(flags: int) -> list[bytes]:
    """Refuse to empty a file that is opened for reading: before Linux 6.2 Landlock takes that for reading."""
    return [
        _argument(flags),
        _step(_ANY_BIT, _O_TRUNC, 0, 3),
        _step(_AND, _ACCESS_MODE),
        _step(_EQUAL, 0, 0, 1),
        _step(_GIVE, _FAIL | EPERM),
        _step(_GIVE, _ALLOW),
    ]
