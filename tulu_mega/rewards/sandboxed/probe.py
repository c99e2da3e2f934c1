"""Tries out on this machine what a confined process cannot do."""

from __future__ import annotations

import ctypes
import os
import socket
import tempfile
from collections.abc import Callable

from .confine import confine, landlock_version


def probe(job: dict, readable: list[str]) -> dict:
    """``{"held": protections that hold, "failed": what a confined process could do all the same, "landlock": version}``."""
    directory = tempfile.mkdtemp(dir=os.getcwd())
    outside = os.path.join(os.getcwd(), "outside")
    with open(outside, "w", encoding="utf-8"):
        pass
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.chdir(directory)
            held = confine(job["probe"], directory, readable)
            failed = [f"{part}:{name}" for part, name, attempt in _attempts(outside) if part in held and _could(attempt)]
            os.write(write, "\n".join([" ".join(held), *failed]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as report:
        first, *failed = report.read().split("\n")
    os.waitpid(child, 0)
    broken = {name.split(":")[0] for name in failed}
    held = [name for name in first.split() if name not in broken]
    return {"held": held, "failed": [name.split(":")[1] for name in failed], "landlock": landlock_version()}


def _could(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _attempts(outside: str) -> list[tuple[str, str, Callable[[], object]]]:
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl() -> None:
        if libc.prctl(1, 0, 0, 0, 0):
            raise OSError("refused")

    def fork() -> None:
        if os.fork() == 0:
            os._exit(0)

    def own_signal() -> None:
        import fcntl

        fcntl.fcntl(0, 8, os.getppid())

    return [
        ("files", "reading outside", lambda: open(outside).close()),
        ("files", "writing outside", lambda: open(outside, "a").close()),
        ("files", "reading /proc", lambda: os.listdir("/proc")),
        ("calls", "a socket", lambda: socket.socket().close()),
        ("calls", "another process", fork),
        ("calls", "a signal", lambda: os.kill(os.getppid(), 0)),
        ("calls", "a signal by a pipe's owner", own_signal),
        ("calls", "a device", lambda: os.mknod("device", 0o020600, os.makedev(1, 3))),
        ("calls", "outliving the parent", prctl),
        ("calls", "another program", lambda: os.execv("/bin/true", ["true"])),
        ("calls", "another's priority", lambda: os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0))),
        ("calls", "the time of a file", lambda: os.utime(".")),
    ]
