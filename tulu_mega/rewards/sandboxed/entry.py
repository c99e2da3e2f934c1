"""The supervisor of one program and its tests.

It reads a job as JSON from standard input, and writes a line of JSON when the program is about to run and for the outcome of each
test as it comes.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress

from . import probe
from .client import Client
from .confine import confine, die_with_parent
from .evaluate import evaluate
from .starter import Starter, run_program, too_large

_FINISH_S = 3.0
_MOST_REPORT = 1 << 16
_MOST_REMOVED = 200
"""Files that are removed before the next test."""


def main() -> None:
    config = json.loads(sys.argv[1])
    die_with_parent(config["parent"], signal.SIGTERM)
    signal.signal(signal.SIGTERM, _leave)
    starter = Starter({"readable": config["readable"], "paths": config["paths"]})
    if starter.request is not None:
        run_program(starter.request)
        return  # to the interpreter's end, as any program
    try:
        job = json.load(sys.stdin)
        if "probe" in job:
            _say(probe.probe(job, config["readable"]))
        else:
            _judge(job, config, starter)
    except SystemExit:
        shutil.rmtree(os.getcwd(), ignore_errors=True)
        raise
    finally:
        starter.close()


def _say(message: dict) -> None:
    print(json.dumps(message), flush=True)


def _leave(*_: object) -> None:
    raise SystemExit(1)


def _judge(job: dict, config: dict, starter: Starter) -> None:
    end = time.monotonic() + job["total_s"]
    for place, test in enumerate(job["tests"]):
        deadline = min(time.monotonic() + job["wall_s"], end)
        if deadline <= time.monotonic():
            _say(_failed("time", f"not run: the tests before took {job['total_s']} s"))
            continue
        directory = tempfile.mkdtemp(dir=os.getcwd())
        with open(os.path.join(directory, "program.py"), "wb") as file:
            file.write(job["program"].encode("utf-8", "surrogatepass"))
        attempt = _Attempt({name: value for name, value in job.items() if name not in ("tests", "program")}, directory, starter)
        if place == 0:
            _say({"started": True})  # from here on the program may be to blame
        _say(attempt.statement(test, config, deadline) if "statement" in test else attempt.script(test, deadline))
        _remove(directory)


def _remove(directory: str) -> None:
    """Removes a test's directory, beside the next tests where that takes long. Whoever called removes what is left at the end."""
    if not too_large(directory, sys.maxsize, _MOST_REMOVED):
        shutil.rmtree(directory, ignore_errors=True)
        return
    parent = os.getpid()
    if os.fork() == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            die_with_parent(parent)
            shutil.rmtree(directory, ignore_errors=True)
        finally:  # programs leave all sorts of trees, also too deep ones for Python
            os._exit(0)


class _Attempt:
    """One test of the program.

    Args:
        limits: of the job.
        directory: its own, with the program in it.
    """

    def __init__(self, limits: dict, directory: str, starter: Starter):
        self._limits, self._directory, self._starter = limits, directory, starter
        self._begun = time.monotonic()

    def script(self, test: dict, deadline: float) -> dict:
        """Run the program on the test's input and compare its output here."""
        name = os.path.join(os.getcwd(), "input")
        with open(name, "wb") as given:
            given.write(test["input"].encode("utf-8", "replace"))
        read, write = os.pipe()
        given = os.open(name, os.O_RDONLY)
        os.unlink(name)
        self._start([given, write], serve=False)
        output, fault = _collect(read, deadline, self._limits["output_mb"] << 20)
        os.close(read)
        result = self._starter.end(deadline if fault is None else 0)
        if fault == "output":
            return _failed("output", f"wrote more than {self._limits['output_mb']} MiB")
        if (reason := self._reason(result, deadline)) is not None:
            return reason
        if result["status"]:
            return _failed("error", f"ended with exit status {result['status']}")
        if _lines(output.decode("utf-8", "replace")) != _lines(test["output"]):
            return _failed("wrong", f"wrote {output[:80].decode('utf-8', 'replace')!r}")
        return {"passed": True, "kind": "", "detail": ""}

    def statement(self, test: dict, config: dict, deadline: float) -> dict:
        """Run the test in one process and the program in another."""
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        report_read, report_write = os.pipe()
        os.set_blocking(read, False)
        null = os.open(os.devnull, os.O_RDONLY)
        self._start([null, write, os.dup(theirs.fileno())], serve=True)
        theirs.close()
        parent = os.getpid()
        test_pid = os.fork()
        if test_pid == 0:
            die_with_parent(parent)
            try:
                self._evaluate(test, config, ours.detach(), read, report_write)
            finally:
                os._exit(0)
        os.close(report_write)
        os.close(read)
        ours.close()
        report, fault = _collect(report_read, deadline, _MOST_REPORT)
        os.close(report_read)
        status = _end(test_pid)
        # A program that ended by itself ended the test too, and its status says how; one that waits for calls is ended.
        result = self._starter.end(time.monotonic() + (0.5 if b'"left"' in report else 0))
        if fault is not None:
            return _failed("time", f"ran longer than {deadline - self._begun:.1f} s")
        if not report:
            return _failed("time" if status in (signal.SIGXCPU, signal.SIGKILL) else "crash", "the test's process ended early")
        answer = json.loads(report)
        ended_itself = answer["kind"] == "left" and result["why"] != "time"
        if ended_itself or result["why"] in ("disk", "threads"):
            return self._reason(result, deadline) or answer
        return answer

    def _start(self, descriptors: list[int], serve: bool) -> None:
        self._starter.start({**self._limits, "directory": self._directory, "serve": serve}, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def _reason(self, result: dict, deadline: float) -> dict | None:
        """Return why the program did not end by itself; None where it did."""
        match result["why"]:
            case "time":
                return _failed("time", f"ran longer than {deadline - self._begun:.1f} s")
            case "disk":
                return _failed("disk", f"wrote more than {self._limits['disk_mb']} MiB or {self._limits['files']} files")
            case "threads":
                return _failed("threads", f"had more than {self._limits['threads']} threads")
        if -result["status"] in (signal.SIGXCPU, signal.SIGKILL):
            return _failed("time", "used too much CPU time")
        return _failed("crash", f"ended by signal {-result['status']}") if result["status"] < 0 else None

    def _evaluate(self, test: dict, config: dict, channel: int, output: int, report: int) -> None:
        """Evaluate the test. Runs in the test's process."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        for place, descriptor in enumerate((channel, output, report)):
            os.dup2(descriptor, 200 + place)
        os.closerange(3, 200)
        sys.path[:] = config["paths"]
        sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")  # noqa: SIM115
        os.chdir(self._directory)
        held = confine(self._limits, self._directory, config["readable"])
        if len(held) < 2 and not self._limits["allow_unprotected"]:
            answer = {"passed": False, "unprotected": True, "kind": "", "detail": "protections are missing"}
        else:
            answer = evaluate(test, Client(200, 201, self._limits["output_mb"]), self._limits["objects"])
        with open(202, "wb", closefd=False) as file:
            file.write(json.dumps(answer).encode())


def _failed(kind: str, detail: str) -> dict:
    return {"passed": False, "kind": kind, "detail": detail}


def _collect(read: int, deadline: float, most: int) -> tuple[bytes, str | None]:
    """Read to the end; also return "time" where the deadline came first, "output" where more than ``most`` bytes came."""
    parts, poll = bytearray(), select.poll()
    poll.register(read, select.POLLIN)
    while True:
        if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
            return bytes(parts), "time"
        part = os.read(read, 1 << 16)
        if not part:
            return bytes(parts), None
        parts += part
        if len(parts) > most:
            return bytes(parts[:most]), "output"


def _end(pid: int) -> int:
    """End the test's process within a bounded time; return the signal that ended it, or 0."""
    end = time.monotonic() + _FINISH_S
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    while (result := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.0005)
    return os.WTERMSIG(result[1]) if os.WIFSIGNALED(result[1]) else 0


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
