"""Runs a command in a session of its own and ends all of that session, however this or its parent's life ends.

A stand-alone script on the standard library alone, so that it starts in milliseconds and holds a few megabytes: between the
launcher and each vLLM server. vLLM starts processes that start processes; a kill of the first orphans the others, with their
memory, their ports and their shared memory.

    keeper.py SCRATCH COMMAND...

- Standard input closes (the parent is done, or dead): the command is asked to end, and what is left of its session after
  ``GRACE_SECONDS`` is killed.
- A byte comes on standard input: all of it is killed at once.
- The command ends by itself: whatever it left is killed, and this ends with the same status.

SCRATCH, a directory, is removed at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_SECONDS = 10.0
TRACKER_SECONDS = 5.0
LOOK_SECONDS = 5.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LINUX = sys.platform.startswith("linux")


def main() -> int:
    scratch, command = sys.argv[1], sys.argv[2:]
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the session become this one's children
    child_ended = _signal_pipe()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_keeper)
    seen: set[int] = set()
    try:
        at_once = _wait(child_ended, child, seen)
        seen.update(_session())
        if not at_once and child.poll() is None:
            child.terminate()
            _until(lambda: child.poll() is not None, GRACE_SECONDS)
    finally:
        _end_session(child, seen)
        shutil.rmtree(scratch, ignore_errors=True)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _die_with_keeper() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if LINUX:
        ctypes.CDLL(None, use_errno=True).prctl(option, value)


def _signal_pipe() -> int:
    """A descriptor that can be read when a child has ended or somebody asks this process to end."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return read


def _wait(child_ended: int, child: subprocess.Popen, seen: set[int]) -> bool:
    """Wait until the child has ended or should end; return whether it should end at once.

    Args:
        seen: gets the session's processes now and then: those that end before the others leave something behind, too.
    """
    while child.poll() is None:
        ready, _, _ = select.select([0, child_ended], [], [], LOOK_SECONDS)
        seen.update(_session())
        if 0 in ready:
            return bool(os.read(0, 1))
        if child_ended in ready and any(number != signal.SIGCHLD for number in os.read(child_ended, 64)):
            return False
    return False


def _end_session(child: subprocess.Popen, seen: set[int]) -> None:
    """Kills all that is left of the session, but lets Python's resource trackers, which follow, remove shared memory first."""

    def left(trackers: bool) -> list[int]:
        found = _session()
        seen.update(found)
        return found if trackers else [pid for pid in found if not _is_tracker(pid)]

    def kill(trackers: bool) -> bool:
        pids = left(trackers)
        for pid in left(True):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if pid in pids else signal.SIGCONT)  # a tracker that was stopped is to go on
        _reap(child)
        return not pids

    _until(lambda: kill(trackers=False), GRACE_SECONDS)
    _until(lambda: _reap(child) or not left(trackers=True), TRACKER_SECONDS)
    _until(lambda: kill(trackers=True), GRACE_SECONDS)
    for pid in seen | {child.pid}:  # Intel's OpenMP leaves one in each process that is killed
        for segment in Path("/dev/shm").glob(f"__KMP_REGISTERED_LIB_{pid}_*"):
            with contextlib.suppress(OSError):
                segment.unlink()


def _session() -> list[int]:
    """The session's other living processes."""
    if not LINUX:
        return []
    mine, found = os.getsid(0), []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                state, _, _, session = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == mine and state not in "ZX":
                    found.append(int(entry))
    return found


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return False


def _reap(child: subprocess.Popen) -> None:
    """Collects ended orphans; the child itself is left to `child`."""
    child.poll()
    with contextlib.suppress(ChildProcessError):
        while child.returncode is not None and os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _until(done, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
