"""Programs that a model wrote, run where they can do no harm."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tulu_mega.errors import UserError

SLACK_S = 5.0
"""Seconds that starting and ending a sandbox may take beyond the program's own limits."""
_ENTRY = Path(__file__).with_name("sandbox_entry.py")
_PROTECTIONS = {
    "files": "Landlock (Linux 5.13 or later, enabled in the kernel and not blocked by the container)",
    "calls": "seccomp filters (Linux on x86_64 or aarch64)",
}


@dataclass(frozen=True)
class CodeLimits:
    """What a program under test may use."""

    wall_s: float = 5.0
    """For one test."""
    total_s: float = 20.0
    """For all tests of a program together; tests that are not reached count as failed."""
    cpu_s: int = 5
    """CPU time of one test."""
    memory_mb: int = 1024
    """Address space, which is more than what is used."""
    file_mb: int = 16
    """Size of a file it writes."""
    allow_unprotected: bool = False
    """Run programs even where the kernel lacks a protection. Only inside a container or machine of their own."""


DEFAULT_LIMITS = CodeLimits()


@dataclass(frozen=True)
class Outcome:
    passed: bool
    detail: str


def protections() -> frozenset[str]:
    """Which of "files" and "calls" this machine can enforce; asked once, in a process of its own."""
    return _protections(sys.executable)


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


def run_program(program: str, tests: Sequence[dict[str, str]], limits: CodeLimits) -> list[Outcome]:
    """Runs the program once for each test, in a fresh process and a fresh directory, one after another.

    Enforced, without needing root: CPU time, wall time, address space, size of a file, open files (64), no core dumps;
    no environment variables of ours, no user site-packages (``python -I``); by seccomp no network, no new process, no
    signal or look into another process, no change of owners, modes or mounts; by Landlock no writing outside the test's own
    directory and no reading but there and in Python's and the system's libraries, so neither home directories nor ``/proc``.

    Not enforced: the number of threads (the address space bounds it), the disk space of many files together, reading
    file names' existence, and honesty: test and program share an interpreter, so a program that searches its caller's frames
    can make a test pass. Kernels before 6.2 let ``O_TRUNC`` through. It is no virtual machine: a hole in the kernel is a
    hole in it.

    Args:
        program: Python source.
        tests: ``{"statement": code to run after the program}`` or ``{"input": text, "output": text}`` for standard input and
            output (compared line by line, trailing spaces and outer empty lines dropped).

    Raises:
        RuntimeError: the sandbox itself failed, which says nothing about the program.
    """
    job = {**asdict(limits), "program": program, "tests": list(tests)}
    answers = _call(job, timeout=limits.total_s + SLACK_S)
    if any(answer.get("unprotected") for answer in answers):
        raise RuntimeError("the sandbox could not confine the program, which was not run")
    return [Outcome(answer["passed"], answer["detail"]) for answer in answers]


@functools.cache
def _protections(executable: str) -> frozenset[str]:
    return frozenset(_call({**asdict(DEFAULT_LIMITS), "probe": True}, timeout=60))


def _call(job: dict[str, Any], timeout: float) -> list[Any]:
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with _directory() as directory:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-B", str(_ENTRY)],
                input=json.dumps(job),
                capture_output=True,
                text=True,
                cwd=directory,
                env=environment,
                timeout=timeout,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the sandbox gave no answer within {timeout:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"the sandbox failed: {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]}")
    return json.loads(done.stdout)


@contextmanager
def _directory() -> Iterator[str]:
    """A temporary directory that goes away whatever was put into it."""
    temporary = tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True)
    try:
        yield temporary.name
    finally:
        with suppress(RecursionError):
            temporary.cleanup()
        if os.path.exists(temporary.name):  # directories nested too deeply for Python
            subprocess.run(["rm", "-rf", "--", temporary.name], check=False, stderr=subprocess.DEVNULL)
