"""Functions by which a process gives up its rights for good."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct

from . import calls

_LIBC = ctypes.CDLL(None, use_errno=True)
_PDEATHSIG, _SECCOMP, _CAPBSET_DROP, _SECUREBITS, _NO_NEW_PRIVS, _CAP_AMBIENT = 1, 22, 24, 28, 38, 47
_CAPSET = {"x86_64": 126, "aarch64": 91}
_MEGABYTE = 1 << 20
OPEN_FILES = 64


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process the signal when its parent ends."""
    _LIBC.prctl(_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def confine(limits: dict, directory: str | None, readable: list[str]) -> list[str]:
    """Take this process's rights away; return the protections that hold: "files", "calls".

    Args:
        limits: ``cpu_s``, ``memory_mb`` and ``file_mb``.
        directory: where it may write.
        readable: directories whose files it may read.
    """
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, limits["cpu_s"], limits["cpu_s"] + 1),
        (resource.RLIMIT_AS, limits["memory_mb"] * _MEGABYTE, limits["memory_mb"] * _MEGABYTE),
        (resource.RLIMIT_FSIZE, limits["file_mb"] * _MEGABYTE, limits["file_mb"] * _MEGABYTE),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    _LIBC.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    drop_capabilities()
    return [name for name, done in (("files", restrict_files(directory, readable)), ("calls", restrict_calls())) if done]


def drop_capabilities() -> None:
    """Empty every set of capabilities of this process."""
    _LIBC.prctl(_CAP_AMBIENT, 4, 0, 0, 0)
    for number in range(64):
        if _LIBC.prctl(_CAPBSET_DROP, number, 0, 0, 0):
            break
    _LIBC.prctl(_SECUREBITS, 0b101111, 0, 0, 0)  # no capabilities for being root, locked
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    if _LIBC.syscall(_CAPSET.get(os.uname().machine, -1), header, nothing) and os.geteuid() == 0:
        os._exit(1)  # cannot happen: to lower one's own is always allowed


def restrict_calls() -> bool:
    """Install the seccomp filter for this process and its threads; return whether that worked."""
    program = calls.seccomp_filter(os.getpid())
    if program is None:
        return False

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    buffer = ctypes.create_string_buffer(program, len(program))
    argument = Program(len(program) // 8, ctypes.addressof(buffer))
    return _LIBC.prctl(_SECCOMP, 2, ctypes.byref(argument), 0, 0) == 0


def landlock_version() -> int:
    """Return the version of the kernel's Landlock; 0 without Landlock."""
    return max(_LIBC.syscall(444, None, 0, 1), 0)


def restrict_files(directory: str | None, readable: list[str]) -> bool:
    """Landlock: write beneath ``directory`` alone, read there and where Python and system libraries lie; whether it could."""
    create_ruleset, add_rule, restrict_self = 444, 445, 446
    version = landlock_version()
    if version < 1:
        return False
    rights = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    networks = 0b11 if version >= 4 else 0
    scopes = 0b11 if version >= 6 else 0  # abstract sockets and signals stay among the confined
    attributes = struct.pack("=QQQ", rights, networks, scopes)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _LIBC.syscall(create_ruleset, attributes, size, 0)
    if ruleset < 0:
        return False
    execute, write_file, read_file, read_dir = 1, 2, 4, 8
    special = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 15  # devices, sockets, FIFOs and commands to devices
    read = read_file | read_dir
    devices = dict.fromkeys(("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"), read_file | write_file)
    own = {directory: rights & ~special & ~execute} if directory else {}
    for path, allowed in {**dict.fromkeys(readable, read), **devices, **own}.items():
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        _LIBC.syscall(add_rule, ruleset, 1, struct.pack("=Qi", allowed, opened), 0)
        os.close(opened)
    done = _LIBC.syscall(restrict_self, ruleset, 0) == 0
    os.close(ruleset)
    return done
