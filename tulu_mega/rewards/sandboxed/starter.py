"""Starts the judged programs. Forked from the supervisor before that reads its job, so no test is in the memory programs get."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import select
import signal
import socket
import stat
import sys
import time
import types
from typing import Any

from . import serve, values
from .confine import confine, die_with_parent

_WATCH_S = 0.05
_FINISH_S = 3.0
_STOP = b"stop"
_SPARE = 200  # beyond the descriptors in use


class Starter:
    """The supervisor's end.

    Args:
        config: ``readable``, ``paths``; nothing about tests.
    """

    def __init__(self, config: dict):
        self._socket, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        self._number = 0
        self.request: dict | None = None
        """In a program's process what it is to run, else None."""
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid:
            theirs.close()
            return
        die_with_parent(parent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._socket.close()
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        self.request = _serve(theirs, config)

    def start(self, request: dict, descriptors: list[int]) -> None:
        """Starts a program on the descriptors (standard input, output, and the channel to its test if there is one)."""
        self._number += 1
        socket.send_fds(self._socket, [json.dumps({**request, "number": self._number}).encode()], descriptors)

    def end(self, deadline: float) -> dict:
        """Waits for the program until the deadline, ends it then: ``{"status", "why"}``. Bounded whatever the program does."""
        if (answer := self._answer(deadline)) is None:
            with contextlib.suppress(OSError):
                self._socket.send(_STOP)
            answer = self._answer(time.monotonic() + _FINISH_S)
        return answer or {"status": -signal.SIGKILL, "why": "time"}

    def _answer(self, deadline: float) -> dict | None:
        """Return how the program ended; None where no answer comes before the deadline."""
        while _readable(self._socket, deadline - time.monotonic()):
            answer = self._socket.recv(1 << 12)
            if not answer:
                raise SystemExit("the process that starts programs ended")
            told = json.loads(answer)
            if told["number"] == self._number:  # not of one before, whose end came too late
                return told
        return None

    def close(self) -> None:
        self._socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def _readable(waiting: socket.socket | int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(waiting, select.POLLIN)
    return bool(poll.poll(max(timeout_s, 0) * 1000))


def _serve(asks: socket.socket, config: dict) -> dict:
    """Starts programs until the supervisor goes. Returns in a program's process alone, with its request."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(asks, 1 << 16, 3)
        if not message:
            os._exit(0)
        if message == _STOP:  # for a program that had just ended
            continue
        request = json.loads(message)
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            die_with_parent(parent)
            for place, descriptor in enumerate(descriptors):
                os.dup2(descriptor, _SPARE + place)
            for place in range(len(descriptors)):
                os.dup2(_SPARE + place, (0, 1, 3)[place])
            os.closerange(3 + (len(descriptors) > 2), 256)
            return {**config, **request}
        for descriptor in descriptors:
            os.close(descriptor)
        asks.send(json.dumps({**_watch(child, asks, request), "number": request["number"]}).encode())


def _watch(child: int, asks: socket.socket, request: dict) -> dict:
    """Waits for a program; ends it when the supervisor says so or it takes too much."""
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(asks, select.POLLIN)
    why = ""
    while ended not in (found := dict(poll.poll(_WATCH_S * 1000))):
        if asks.fileno() in found:
            if asks.recv(16) != _STOP:
                os.kill(child, signal.SIGKILL)
                os._exit(0)
            why = _excess(child, request) or "time"  # what it took since it was looked at last counts, too
        else:
            why = _excess(child, request)
        if why:
            os.kill(child, signal.SIGKILL)
            _readable(ended, _FINISH_S)
            break
    os.close(ended)
    end = time.monotonic() + _FINISH_S
    while (result := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            return {"status": -signal.SIGKILL, "why": why}
        time.sleep(0.01)
    if why in ("", "time"):
        why = _excess(child, request, threads=False) or why
    return {"status": os.waitstatus_to_exitcode(result[1]), "why": why}


def _excess(child: int, request: dict, threads: bool = True) -> str:
    """Return which limit a program exceeds, "threads" or "disk"; an empty text where none."""
    if threads and _threads(child) > request["threads"]:
        return "threads"
    most = request["disk_mb"] << 20
    if threads:  # it is there to be looked at
        most -= _nameless(child, request["directory"], request["file_mb"] << 20)
    return "disk" if most < 0 or too_large(request["directory"], most, request["files"]) else ""


def _nameless(child: int, directory: str, largest: int) -> int:
    """Bytes of files without a name that a program holds: by its descriptors, and by its memory, where their sizes are not told
    and each counts as the largest."""
    held, seen = 0, set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{child}/fd"):
            with contextlib.suppress(OSError):
                found = os.stat(entry.path)
                if stat.S_ISREG(found.st_mode) and not found.st_nlink and found.st_ino not in seen:
                    seen.add(found.st_ino)
                    held += found.st_blocks * 512
    mapped, ours = set(), f"{directory}/".encode()
    with contextlib.suppress(OSError), open(f"/proc/{child}/maps", "rb") as maps:
        for line in maps:
            parts = line.split(maxsplit=5)
            if len(parts) > 5 and parts[5].startswith(ours) and parts[5].rstrip().endswith(b" (deleted)"):
                mapped.add(int(parts[4]))
    return held + len(mapped - seen) * largest


def _threads(child: int) -> int:
    try:
        with open(f"/proc/{child}/status", encoding="ascii", errors="replace") as status:
            return next((int(line.split()[1]) for line in status if line.startswith("Threads:")), 0)
    except OSError:
        return 0


def too_large(directory: str, most_bytes: int, most_files: int) -> bool:
    """Whether files beneath a directory hold more, or are more, or are hidden from us. Stops where that is known."""
    folders, held, files = [directory], 0, 0
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    files += 1
                    held += entry.stat(follow_symlinks=False).st_blocks * 512
                    if files > most_files or held > most_bytes:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except OSError as error:  # gone, or closed to us (who are not root), or nested beyond what a path can say
            if error.errno in (errno.EACCES, errno.ENAMETOOLONG):
                return True
    return False


def run_program(request: dict) -> None:
    """In the program's process: rights away, then the program as ``python -I program.py`` runs it."""
    os.setsid()
    os.chdir(request["directory"])
    held = confine(request, request["directory"], request["readable"])
    if len(held) < 2 and not request["allow_unprotected"]:
        os._exit(1)
    main = _as_main(request)
    with open(main.__file__, "rb") as file:
        source = file.read()
    channel = 3 if request["serve"] else None
    server = None if channel is None else serve.Server(main.__dict__, channel)
    _forget()
    if server is None:
        exec(compile(source, main.__file__, "exec", dont_inherit=True), main.__dict__)
        return
    try:
        try:
            exec(compile(source, main.__file__, "exec", dont_inherit=True), main.__dict__)
        except SystemExit as end:  # a script may end so; a test that calls its functions still runs
            if end.code not in (None, 0):
                raise
    except BaseException as error:
        server.say(serve.failure(error, values.Encoder(server.tell)))
        os._exit(0)
    server.flush()
    server.say(["ready"])
    server.serve()


_old_main: Any = None


def _as_main(request: dict) -> types.ModuleType:
    """A fresh ``__main__`` with fresh standard streams."""
    global _old_main
    _old_main = sys.modules["__main__"]  # its end is the interpreter's
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=os.path.join(request["directory"], "program.py"), __builtins__=__builtins__, __cached__=None)
    sys.modules["__main__"] = main
    sys.argv[:] = [main.__file__]
    sys.path[:] = request["paths"]
    os.environ.update(HOME=request["directory"], TMPDIR=request["directory"])
    for number, mode, name in ((0, "r", "stdin"), (1, "w", "stdout"), (2, "w", "stderr")):
        raw = io.FileIO(number, mode, closefd=False)
        buffered = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
        errors = "backslashreplace" if number == 2 else "surrogateescape"
        stream = io.TextIOWrapper(buffered, encoding="utf-8", errors=errors, newline=None if mode == "r" else "\n")
        stream.mode = mode
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    import site

    site.setquit()
    site.sethelper()
    site.setcopyright()
    return main


def _forget() -> None:
    """Has the program import nothing of ours by name."""
    for name in [name for name in sys.modules if name == "sandboxed" or name.startswith("sandboxed.")]:
        del sys.modules[name]
