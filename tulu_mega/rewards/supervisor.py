"""The judge's end of a sandbox: it starts the supervisor and receives each test's outcome, under time limits of its own."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

_END_S = 3.0
"""Seconds for a supervisor to end by itself after its last message, and after it was killed."""
_MOST_WORDS = 1 << 16


@dataclass
class Heard:
    """The messages of a supervisor."""

    started: bool = False
    """the program was about to run: from then on it may be to blame"""
    messages: list[dict[str, Any]] = field(default_factory=list)
    late: bool = False
    """whether its time ran out"""
    trouble: str = ""
    """why messages are missing; empty where all came"""


def hear(
    command: Sequence[str], job: dict[str, Any], messages: int, start_s: float, work_s: float, cwd: str, env: dict[str, str]
) -> Heard:
    """Runs a supervisor until it has said all, or its time is over. It is gone afterwards, and so are its processes.

    Args:
        job: what it reads.
        messages: how many it has to say beside that it has started.
        start_s: seconds until it says that or its first message.
        work_s: seconds from there on.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=env, start_new_session=True
    )
    heard = Heard()
    try:
        _listen(process, json.dumps(job).encode(), messages, start_s, work_s, heard)
        if len(heard.messages) == messages:
            _wait(process)  # for what it removes
        elif not heard.late:
            heard.trouble = f"the sandbox failed: {_last_words(process)}"
    finally:
        process.kill()
        _wait(process)
        for stream in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError):
                stream.close()
    return heard


def _listen(process: subprocess.Popen[bytes], job: bytes, messages: int, start_s: float, work_s: float, heard: Heard) -> None:
    """Until all is said, the time is over, or the supervisor has gone."""
    rest, said = memoryview(job), bytearray()
    given, told = process.stdin.fileno(), process.stdout.fileno()
    for end in (given, told):
        os.set_blocking(end, False)
    deadline = time.monotonic() + start_s
    with selectors.DefaultSelector() as ends:
        ends.register(given, selectors.EVENT_WRITE)
        ends.register(told, selectors.EVENT_READ)
        while len(heard.messages) < messages:
            ready = [key.fd for key, _ in ends.select(max(deadline - time.monotonic(), 0))]
            if not ready and time.monotonic() >= deadline:
                heard.late = True
                where = f"ran longer than {work_s:g} s" if heard.started else f"the sandbox did not start within {start_s:g} s"
                heard.trouble = where
                return
            if given in ready:
                with suppress(BrokenPipeError):
                    rest = rest[os.write(given, rest[: 1 << 16]) :] if rest else rest
                if not rest:
                    ends.unregister(given)
                    process.stdin.close()
            if told in ready:
                if not (part := os.read(told, 1 << 16)):
                    return
                *lines, last = (bytes(said) + part).split(b"\n")
                said[:] = last
                for line in map(json.loads, lines):
                    if "started" in line:
                        heard.started, deadline = True, time.monotonic() + work_s
                    else:
                        heard.messages.append(line)


def _wait(process: subprocess.Popen[bytes]) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)


def _last_words(process: subprocess.Popen[bytes]) -> str:
    """Return the last message of a supervisor that has closed its output, or how it ended."""
    _wait(process)
    os.set_blocking(process.stderr.fileno(), False)
    with suppress(BlockingIOError):
        if lines := process.stderr.read(_MOST_WORDS).decode(errors="replace").strip().splitlines():
            return lines[-1]
    status = process.returncode
    return "it closed its output" if status is None else f"signal {-status}" if status < 0 else f"exit status {status}"
