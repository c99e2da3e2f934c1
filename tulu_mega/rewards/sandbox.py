"""Programs that a model wrote, run where they can do no harm."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from tulu_mega.errors import UserError
from tulu_mega.rewards.statements import prepared
from tulu_mega.rewards.supervisor import Heard, hear

SLACK_S = 5.0
"""Seconds that starting and ending a sandbox may take beyond the program's own limits."""
_START_S = SLACK_S / 2
"""Seconds of these until the program is started; a start is tried twice."""
_REMOVE_S = 3.0
_REMOVE = 'rm -rf -- "$1" || { chmod -R u+rwx -- "$1"; rm -rf -- "$1"; }'
"""Commands that remove a directory; the second removes directories that their owner cannot enter."""
_START = "import sys; sys.path.append(sys.argv[2]); from sandboxed.entry import main; main()"
_PROTECTIONS = {
    "files": "Landlock (Linux 5.13 or later, enabled in the kernel and not blocked by the container)",
    "calls": "seccomp filters (Linux on x86_64 or aarch64)",
}
_BY = {"files": "Landlock {landlock}", "calls": "seccomp"}


@dataclass(frozen=True)
class CodeLimits:
    """What a program under test may use."""

    wall_s: float = 5.0
    """Wall time of one test."""
    total_s: float = 20.0
    """Wall time of all tests of a program together; tests that are not reached count as failed."""
    cpu_s: int = 5
    """CPU time of one test."""
    memory_mb: int = 1024
    """Address space, which is more than what is used."""
    file_mb: int = 16
    """Size of a file it writes."""
    output_mb: int = 16
    """Size of standard output; a program that writes more has failed, with the kind "output"."""
    disk_mb: int = 64
    """All files it writes together in one test."""
    files: int = 4000
    """Number of files it writes in one test."""
    threads: int = 128
    """Threads at a time."""
    objects: bool = False
    """Give tests objects of the program's classes; such an object can decide more than a value can."""
    allow_unprotected: bool = False
    """Run programs even where the kernel lacks a protection. Only inside a container or machine of their own."""


DEFAULT_LIMITS = CodeLimits()


@dataclass(frozen=True)
class Outcome:
    passed: bool
    detail: str
    kind: str = ""
    """Why it has not passed: "wrong" (another answer), "error" (an exception, an exit status), or what the program did beside the
    point: "time", "memory", "output", "disk", "threads", "crash", "left" (before the test was through), "tampered" (with the
    answers to the test), "unserved" (gave the test what does not go over to it)."""


def protections() -> frozenset[str]:
    """Return which of "files" and "calls" this machine can enforce, found by trying once in a separate process."""
    return frozenset(_probe(sys.executable)["held"])


def self_test() -> str:
    """Return a line that says which protections this machine has."""
    found = _probe(sys.executable)
    held = [f"{name} by {_BY[name].format(**found)}" for name in _PROTECTIONS if name in found["held"]]
    missing = [name for name in _PROTECTIONS if name not in found["held"]]
    failed = f"; not refused: {', '.join(found['failed'])}" if found["failed"] else ""
    as_root = ", started as root and without its capabilities" if os.geteuid() == 0 else ""
    return f"sandbox: confined {' and '.join(held) or 'nothing'}{as_root}; missing: {', '.join(missing) or 'nothing'}{failed}"


def require_protections(limits: CodeLimits) -> None:
    """
    Raises:
        UserError: a protection is missing and ``limits.allow_unprotected`` is not set.
    """
    missing = _PROTECTIONS.keys() - protections()
    if missing and not limits.allow_unprotected:
        what = " and ".join(_PROTECTIONS[name] for name in sorted(missing))
        raise UserError(
            f"python_code: this machine cannot confine the programs that a model writes: {what} is missing. Run on a "
            "machine that has it, or, in a container of its own, allow unprotected programs (CodeLimits.allow_unprotected)"
        )


def run_program(program: str, tests: Sequence[dict[str, str]], limits: CodeLimits, prompt: str = "") -> list[Outcome]:
    """Runs the program once for each test, in a process and a directory of its own, one after another.

    A program is run as ``python -I program.py`` runs it. It gets standard input alone, or answers the calls of a statement,
    which is evaluated in another process: what the statement compares are built-in values, whatever the program made of Python in
    its own process. Neither tests nor expected outputs are in the memory or the descriptors of the program's process.

    Enforced, without needing root: CPU time, wall time, address space, size of a file and of all files, their number, open
    files, threads, output; no core dumps; no environment variables of ours, no user site-packages; no capabilities, also as
    root; by seccomp a list of the calls that are allowed, so no network, new process, signal or look into another process,
    device, change of owners, modes or mounts, nor a way to outlive its parent; by Landlock no writing outside the test's own
    directory and no reading but there and in Python's and the system's libraries, so neither home directories nor ``/proc``.

    Not enforced: reading file names' existence. It is no virtual machine: a hole in the kernel is a hole in it.

    Args:
        program: Python source.
        tests: ``{"statement": code that calls the program's functions}`` or ``{"input": text, "output": text}`` for standard
            input and output (compared line by line, trailing spaces and outer empty lines dropped).
        prompt: what the model was asked. Functions that it defines in full and a statement calls are the prompt's, not the
        program's.

    Time is kept here, too: a test of which nothing is heard in time, or whose sandbox ends, has failed.

    Raises:
        RuntimeError: the sandbox failed before the program was started (twice), or could not confine it.
    """
    asked = [prepared(test["statement"], prompt) if "statement" in test else test for test in tests]
    job = {**asdict(limits), "program": program, "tests": asked}
    for _ in range(2):  # what did not start may start when it is tried again
        heard = _call(job, _START_S, limits.total_s + SLACK_S)
        if heard.started:
            break
    else:
        raise RuntimeError(heard.trouble)
    if any(answer.get("unprotected") for answer in heard.messages):
        raise RuntimeError("the sandbox could not confine the program, which was not run")
    outcomes = [Outcome(answer["passed"], answer["detail"], answer["kind"]) for answer in heard.messages]
    # Whatever became of the sandbox after the program was started, the program may have brought it about.
    lost = Outcome(False, heard.trouble, "time" if heard.late else "crash")
    return outcomes + [lost] * (len(tests) - len(outcomes))


@functools.cache
def _probe(executable: str) -> dict[str, Any]:
    heard = _call({"probe": asdict(DEFAULT_LIMITS)}, start_s=60)
    if not heard.messages:
        raise RuntimeError(heard.trouble)
    return heard.messages[0]


def _call(job: dict[str, Any], start_s: float, work_s: float = 0.0) -> Heard:
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    config = json.dumps({"parent": os.getpid(), **_places()})
    with _directory() as directory:
        command = [sys.executable, "-I", "-S", "-B", "-c", _START, config, os.path.dirname(__file__)]
        return hear(command, job, len(job.get("tests", [0])), start_s, work_s, cwd=directory, env=environment)


def _places() -> dict[str, list[str]]:
    """What confined processes may read, and where in it they import from."""
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    readable = sorted({*prefixes, "/usr", "/lib", "/lib64", "/bin"})
    paths = [path for path in sys.path if any(os.path.abspath(path).startswith(prefix.rstrip("/") + "/") for prefix in prefixes)]
    return {"readable": readable, "paths": paths}


@contextmanager
def _directory() -> Iterator[str]:
    """A temporary directory that goes away whatever was put into it."""
    path = tempfile.mkdtemp(prefix="sandbox-")
    try:
        yield path
    finally:
        _remove(path)


def _remove(path: str) -> None:
    """Removes a directory. What takes long is left to a process of its own: no program may use up the time of its verdict."""
    with suppress(OSError):
        os.rmdir(path)  # the supervisor has removed what was in it
        return
    null = subprocess.DEVNULL
    command = ["sh", "-c", _REMOVE, "sh", path]
    where = os.path.dirname(path)
    try:
        removing = subprocess.Popen(command, cwd=where, stdin=null, stdout=null, stderr=null, start_new_session=True)
    except OSError:  # no process to be had just now, which takes no verdict away
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(subprocess.TimeoutExpired):
        removing.wait(_REMOVE_S)
