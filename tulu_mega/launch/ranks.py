"""The ranks of a world on this machine: started, waited for, asked to end, started again."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega.errors import HUNG, Stopped, UserError
from tulu_mega.launch.reporting import (
    ASKS,
    ERROR_FILE,
    HANGUP_LOG,
    KILLED,
    LAUNCHER_PID,
    Terminal,
    ignored,
    read_record,
    report,
    tell_killed,
)
from tulu_mega.launch.run_dir import lost, make_private
from tulu_mega.launch.scratch import scratch

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import PContext

_TAIL_LINES = 20


def start_world(size: int, run_dir: str | None, program: list[str], environ: Mapping[str, str], starts: int, grace: float) -> int:
    """Start the ranks, and start them again when one fails for a reason that the user cannot mend: at most `starts` starts."""
    for start in range(1, starts + 1):
        status, final = _one_world(size, run_dir, program, environ, grace)
        if final or start == starts:
            break
        print(f"the ranks are started again ({start} of {starts - 1} times)", file=sys.stderr, flush=True)
    return status


def _one_world(size: int, run_dir: str | None, program: list[str], environ: Mapping[str, str], grace: float) -> tuple[int, bool]:
    """Run a world; return its exit status, and whether it is final: another start would fail in the same way."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch())
        logs = Path(run_dir, "logs") if run_dir else folder
        try:
            make_private(logs.parent)
            logs.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir: {logs} cannot be made: {error.strerror}; choose a directory you may write") from None
        store = _loopback_store()
        hangup = str(logs / "hangup.log")
        environ = {**environ, HANGUP_LOG: hangup}
        asked = stack.enter_context(_signals_noted(hangup))
        return _wait(_ranks(size, program, store.port, logs, folder, environ), size, folder, grace, asked, run_dir)


def _loopback_store():
    """Open the store in which the ranks meet, on the loopback interface. torch's store listens on every interface unless it is
    handed a socket."""
    from torch.distributed import TCPStore

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _ranks(size: int, program: list[str], port: int, logs: Path, scratch: Path, environ: Mapping[str, str]) -> PContext:
    from torch.distributed.elastic.multiprocessing import start_processes
    from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

    class RankLogs(LogsSpecs):
        """Rank 0 on the console, the others in files."""

        def reify(self, envs):
            def files(stream: str) -> dict[int, str]:
                return {rank: str(_fresh(logs / f"rank_{rank}.{stream}.log")) if rank else "" for rank in envs}

            return LogsDest(
                stdouts=files("stdout"), stderrs=files("stderr"), error_files={r: str(_error_file(scratch, r)) for r in envs}
            )

        @property
        def root_log_dir(self):
            return str(logs)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the ranks are clients of our store
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // size))),
        "PYTHONUNBUFFERED": "1",  # a killed rank's log is whole
        # messages of tensor parallelism overlap products only when kernels start in the order in which they are queued
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
        LAUNCHER_PID: str(os.getpid()),
        **environ,
    }
    if sys.platform.startswith("linux"):  # gloo otherwise asks what the host name resolves to, often nothing useful
        common["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    envs = {
        rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_FILE: str(_error_file(scratch, rank))}
        for rank in range(size)
    }
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say what failed
    with _elastic_takes_no_signals():
        return start_processes("tulu_mega", program[0], {rank: tuple(program[1:]) for rank in range(size)}, envs, RankLogs())


@contextlib.contextmanager
def _elastic_takes_no_signals() -> Iterator[None]:
    """Elastic's handlers raise wherever the launcher is, also while it ends the ranks that an earlier signal asked to end."""
    name = "TORCHELASTIC_SIGNALS_TO_HANDLE"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({} if before is None else {name: before})


def _fresh(log: Path) -> Path:
    """Return a log's path, after renaming the log of an earlier start, which may say why that start failed."""
    with contextlib.suppress(OSError):
        if log.stat().st_size:
            log.replace(log.with_suffix(".1.log"))
    return log


def _error_file(scratch: Path, rank: int) -> Path:
    return scratch / f"rank_{rank}.error.json"


def _wait(
    context: PContext, size: int, scratch: Path, grace: float, asked: list[signal.Signals], run_dir: str | None
) -> tuple[int, bool]:
    while not (result := context.wait(timeout=0)) and not asked:
        time.sleep(0.1)
    if asked and (result is None or result.is_failed()):
        status = _ended(context, asked, grace, run_dir)
        stopped = any("stopped" in read_record(_error_file(scratch, rank)) for rank in range(size))
        if status == Stopped.status and not stopped:
            print("asked to end: no finished step was unsaved", file=sys.stderr, flush=True)
        return status, True
    if not result.is_failed():
        return 0, True
    codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
    records = {rank: read_record(_error_file(scratch, rank)) for rank in codes}
    rank = _first_failure(codes, records)
    if "stopped" in records[rank]:  # a rank was asked, not the launcher
        return codes[rank], True
    if "problems" in records[rank]:
        report(records[rank]["problems"])
        return codes[rank], True
    print(
        _describe_failure(rank, size, codes[rank], context.stderrs[rank], context.stdouts[rank], scratch),
        file=sys.stderr,
        flush=True,
    )
    return codes[rank] if codes[rank] > 0 else 128 - codes[rank], False


def _ended(context: PContext, asked: list[signal.Signals], grace: float, run_dir: str | None) -> int:
    """End the ranks as the first signal asks, at once when a second signal comes; return the exit status.

    A second SIGHUP does not count: the terminal and its shell each send one.
    """
    first = asked[0]
    if first not in ASKS:
        context.close(death_sig=signal.SIGKILL, timeout=5)
        print(f"interrupted: {lost(run_dir)}", file=sys.stderr, flush=True)
        return 128 + first
    if first == signal.SIGHUP:
        print("SIGHUP, the terminal was closed: the run is asked to end", file=sys.stderr, flush=True)
    began = time.monotonic()
    closing = threading.Thread(target=context.close, kwargs={"death_sig": first, "timeout": grace}, daemon=True)
    closing.start()
    while closing.is_alive() and all(number == signal.SIGHUP for number in asked[1:]):
        closing.join(0.1)
    if killed := closing.is_alive():
        context.close(death_sig=signal.SIGKILL, timeout=5)
        closing.join(5)
    took = time.monotonic() - began
    if killed or took > grace:
        tell_killed(round(min(took, grace), 1), "checkpoint.grace")
        return KILLED
    return Stopped.status


def _first_failure(codes: Mapping[int, int], records: Mapping[int, dict[str, Any]]) -> int:
    """Return the rank that failed first and so made others fail: one that its watchdog ended, one killed by a signal that was not
    ours, else the earliest recorded.

    A watchdog ends a rank that waits for another one. The other one may not react to SIGTERM, and is then killed by elastic.
    """

    def order(rank: int):
        killed = codes[rank] < 0 and codes[rank] != -signal.SIGTERM
        ended_by_us = codes[rank] == -signal.SIGTERM
        return (codes[rank] != HUNG, not killed, ended_by_us, records[rank].get("time", float("inf")), rank)

    return min(codes, key=order)


def _describe_failure(rank: int, size: int, code: int, stderr: str, stdout: str, scratch: Path) -> str:
    if code < 0:
        how = f"was killed by {signal.strsignal(-code) or f'signal {-code}'}"
        how += " (out of memory?)" if code == -signal.SIGKILL else ""
    elif code == HUNG:
        how = f"made no progress and was ended (status {code}); the watchdog's report says which rank is missing"
    else:
        how = f"failed with exit status {code}"
    message = f"error: rank {rank} of {size} {how}"
    if not stderr:
        return f"{message}; its output is above"
    tail = _tail(stderr) or _tail(stdout)
    where = "" if Path(stderr).is_relative_to(scratch) else f" ({stderr})"
    return "\n".join([f"{message}; the end of its output{where}:", *(f"  {line}" for line in tail or ["(nothing)"])])


def _tail(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    except OSError:
        return []


@contextlib.contextmanager
def _signals_noted(hangup: str) -> Iterator[list[signal.Signals]]:
    """Yield a list to which signals that ask the launcher to end are appended; nothing is interrupted.

    Afterwards they do again what they did. Where one has come the launcher ends, and tidies up before: the others are ignored, by
    the system, since Python's own handlers are gone before the process is.

    Args:
        hangup: the file that gets what is said once the terminal is closed.
    """
    asked: list[signal.Signals] = []
    terminal = Terminal(hangup)

    def note(number: int, _frame: object) -> None:
        asked.append(signal.Signals(number))
        if number == signal.SIGHUP:
            terminal.closed()

    taken = [number for number in (*ASKS, signal.SIGINT, signal.SIGQUIT) if number != signal.SIGHUP or not ignored(number)]
    before = {number: signal.signal(number, note) for number in taken}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if asked else handler)
