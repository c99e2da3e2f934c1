"""Worlds of ranks: joins the one torchrun made, or starts one on this machine.

A rank is this program itself with the same arguments; what torchrun's environment variables (RANK, WORLD_SIZE,
MASTER_ADDR, ...) say decides which of the two a process is. A world started here rendezvouses over a store on the
loopback interface that the launcher holds and dies with its launcher however that dies. Commands that generate while they train
have vLLM servers beside the world, which outlive it: where `restarts` is set, a world that fails is started again and finds
them as they were.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega.errors import Stopped, UserError
from tulu_mega.process import uncollected

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import PContext

    from tulu_mega.config import EngineSettings, ParallelSettings

_LAUNCHER_PID = "TULU_MEGA_LAUNCHER_PID"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun gives one to each of its ranks and shows what is in it; so do we
_TAIL_LINES = 20
_AGENT_SECONDS = 5.0
_TURN_SECONDS = 2.0
AGENT_PID = "TULU_MEGA_AGENT_PID"
"""Environment variable: the process of `tulu_mega.agent` that started this rank."""
KILLED = 137
"""Exit status where ranks were asked to end and were killed, since they took longer than they had."""
FINAL = signal.SIGUSR2
"""What a rank sends that agent where ranks which are started again would fare no better."""
ASKS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to end (SIGUSR1 is for Slurm's --signal): handed on to the ranks, which may save. Others end them at once."""


@dataclass(frozen=True)
class World:
    """This process's place among the ranks."""

    rank: int
    size: int
    local_rank: int
    """rank among the processes of this machine: the index of its GPU"""
    local_size: int
    data_parallel: int
    """DP: size / (TP x PP x CP)"""


def run(target: str, settings: EngineSettings, program: Sequence[str], prepare: Callable[[Any], None]) -> int:
    """Calls ``target(settings, world)`` on every rank of a world.

    Args:
        target: ``module:function``.
        settings: the command's settings.
        program: the command line of a rank, which is to come here again, as a rank.
        prepare: checks the settings and makes what the ranks will read; called once, before they start.

    Returns:
        The exit status: 0, or that of the rank that failed first (128 + n where signal n ended it).

    Raises:
        UserError: when the layout does not fit the world or the machine; whatever `prepare` raises.
    """
    for name, value in settings.precision.environment.items():  # read when libraries are imported, which no rank has done yet
        os.environ.setdefault(name, value)
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        world = joined_world(settings.parallel, os.environ)
        if world.rank == 0 and not _started_by_launcher():
            prepare(settings)  # the other ranks wait for this one where they meet
        resolve("tulu_mega.platforms:prepare_imports")()
        return int(resolve(target)(settings, world) or 0)
    size = settings.parallel.model_parallel * (settings.parallel.data or 1)
    _check_devices(settings.parallel, size)
    prepare(settings)
    with contextlib.ExitStack() as stack:
        environ = {}
        if hasattr(settings, "rollout") and not settings.rollout.urls:
            beside = stack.enter_context(resolve("tulu_mega.inference.for_run:servers")(settings, trainers=size))
            environ = beside.for_ranks  # they start while the ranks do
            if beside.shared:  # or before: vLLM wants others on its GPU to hold still while it measures their memory
                beside.wait()
        grace = settings.checkpoint.grace if hasattr(settings, "checkpoint") else 10.0
        starts = 1 + getattr(settings, "restarts", 0)
        return _start_world(size, getattr(settings, "run_dir", None), list(program), environ, starts, grace)


def joined_world(parallel: ParallelSettings, env: Mapping[str, str]) -> World:
    """The world that torchrun's environment variables describe.

    Raises:
        UserError: when they are incomplete, or the layout does not divide or match the world.
    """
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    if missing := [name for name in names if name not in env]:
        raise UserError(f"RANK and MASTER_ADDR are set, but not {', '.join(missing)}; start the ranks with torchrun")
    try:
        rank, size, local_rank, local_size = (int(env[name]) for name in names)
    except ValueError:
        got = ", ".join(f"{name}={env[name]!r}" for name in names)
        raise UserError(f"expected integers in {got}; start the ranks with torchrun") from None
    replica = parallel.model_parallel
    layout = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    if size % replica:
        raise UserError(f"parallel: {layout} = {replica} processes a replica do not divide the world of {size}; change either")
    if parallel.data is not None and parallel.data * replica != size:
        raise UserError(
            f"parallel: {layout} x data {parallel.data} = {parallel.data * replica} processes, but torchrun started {size}; "
            f"set parallel.data to {size // replica}, or start {parallel.data * replica}"
        )
    return World(rank, size, local_rank, local_size, size // replica)


def resolve(target: str) -> Any:
    """The object that ``module:attribute`` names.

    Raises:
        UserError: when a package that the module needs is not installed.
    """
    module, _, attribute = target.partition(":")
    try:
        with uncollected():
            return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing == "tulu_mega":
            raise
        raise UserError(
            f"the package {missing!r} is not installed in {sys.executable}; install tulu-mega with its 'cpu' or 'gpu' extra"
        ) from error


def die_with_launcher() -> None:
    """In a rank that `run` started: has the kernel kill it when the launcher is gone. Elsewhere nothing.

    Linux only; on other systems ranks end with the launcher when it ends in an orderly way.
    """
    if _LAUNCHER_PID not in os.environ or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if not _started_by_launcher():  # it died before the kernel was told
        os._exit(1)


def report(problems: Sequence[str]) -> None:
    """Tells the user about problems, once for the whole world.

    In a rank they go to its error file, which the launcher (ours, torchrun) shows; under torchrun rank 0 prints them too. Under
    `tulu_mega.agent` the first rank of each node prints them, and has the agent end without starting ranks again.
    """
    rank, agent = os.environ.get("RANK"), _agent()
    if rank is not None:
        _record(problems[0] if problems else "", {"problems": list(problems)})
        if _started_by_launcher() and _ERROR_FILE in os.environ:
            return
        if agent:  # a problem that all have is told by the first, and the agent ends the others
            time.sleep(_TURN_SECONDS * int(os.environ["LOCAL_RANK"]))
        elif rank != "0" and _ERROR_FILE in os.environ:
            return
    prefix = "" if rank in (None, "0") else f"[rank {rank}] "
    for problem in problems:
        print(f"{prefix}error: {problem}", file=sys.stderr, flush=True)
    if agent:
        os.kill(agent, FINAL)
        time.sleep(_AGENT_SECONDS)  # it ends us; before it was told, it would take our end for a failure


def report_stop(stopped: Stopped) -> None:
    """In a rank that was asked to end, and has: says so, once for the whole world, to the user and to whoever started the ranks.

    torchrun starts ranks again that end as these do, on every node that was not asked itself: one rank of each node asks it.
    """
    _record(str(stopped), {"stopped": stopped.step})
    if os.environ.get("RANK") == "0":
        print(stopped, file=sys.stderr, flush=True)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if os.environ.get("LOCAL_RANK") == "0":
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(_AGENT_SECONDS)  # it ends us; before it was asked, it would take our end for a failure


def tell_killed(seconds: float, setting: str) -> None:
    """Says that ranks which were asked to end have not saved.

    Args:
        seconds: that they had.
        setting: what sets these.
    """
    print(
        f"error: the ranks did not end within {seconds:g} s and were killed; what was done since the last checkpoint is lost. "
        f"{setting} sets how long they have; it should cover a step and a save",
        file=sys.stderr,
        flush=True,
    )


def _agent() -> int:
    """The process that started this rank, if that is `tulu_mega.agent`; else 0."""
    parent = os.getppid()
    return parent if os.environ.get(AGENT_PID) == str(parent) else 0


def record_crash(error: BaseException) -> None:
    """In a rank: notes an exception that nobody expected, so that the launcher can tell which rank failed first."""
    if "RANK" in os.environ:
        _record(f"{type(error).__name__}: {error}", {"callstack": "".join(traceback.format_exception(error))})


def _record(message: str, details: dict[str, Any]) -> None:
    """Writes the error file in the form torchrun reads; the first error of a rank stays."""
    file = os.environ.get(_ERROR_FILE)
    if file is None or os.path.exists(file):
        return
    now = time.time()
    extra = {"timestamp": str(int(now)), "py_callstack": details.get("callstack", message)}
    content = {"message": {"message": message, "extraInfo": extra}, "time": now, **details}
    with contextlib.suppress(OSError):
        whole = Path(f"{file}.part")  # elastic stumbles over half a file
        whole.write_text(json.dumps(content), encoding="utf-8")
        whole.replace(file)


def _started_by_launcher() -> bool:
    return os.environ.get(_LAUNCHER_PID) == str(os.getppid())


def _check_devices(parallel: ParallelSettings, size: int) -> None:
    import torch

    if torch.cuda.is_available() and size > torch.cuda.device_count():
        raise UserError(
            f"parallel: the layout takes {size} processes (tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} x data {parallel.data or 1}), but this machine has {torch.cuda.device_count()} GPU(s); "
            "use a smaller layout, or torchrun over several machines"
        )


def _start_world(
    size: int, run_dir: str | None, program: list[str], environ: Mapping[str, str], starts: int, grace: float
) -> int:
    """Starts the ranks, and again when one fails for a reason that the user cannot mend; at most `starts` times."""
    for start in range(1, starts + 1):
        status, final = _one_world(size, run_dir, program, environ, grace)
        if final or start == starts:
            break
        print(f"the ranks are started again ({start} of {starts - 1} times)", file=sys.stderr, flush=True)
    return status


def _one_world(size: int, run_dir: str | None, program: list[str], environ: Mapping[str, str], grace: float) -> tuple[int, bool]:
    """The exit status of a world, and whether another one would fare no better."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tulu_mega_")))
        logs = Path(run_dir, "logs") if run_dir else scratch
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir: {logs} cannot be made: {error.strerror}; choose a directory you may write") from None
        store = _loopback_store()
        stack.enter_context(_signals_restored())
        return _wait(_ranks(size, program, store.port, logs, scratch, environ), size, scratch, grace)


def _loopback_store():
    """The ranks' rendezvous. torch's store listens on every interface unless it is handed a socket."""
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
        _LAUNCHER_PID: str(os.getpid()),
        **environ,
    }
    if sys.platform.startswith("linux"):  # gloo otherwise asks what the host name resolves to, often nothing useful
        common["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    envs = {
        rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), _ERROR_FILE: str(_error_file(scratch, rank))}
        for rank in range(size)
    }
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say what failed
    ranks = start_processes("tulu_mega", program[0], {rank: tuple(program[1:]) for rank in range(size)}, envs, RankLogs())
    signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGTERM))  # elastic has taken that over
    return ranks


def _fresh(log: Path) -> Path:
    """A log's path; what a start before this one left there is kept beside it, since it may say why it failed."""
    with contextlib.suppress(OSError):
        if log.stat().st_size:
            log.replace(log.with_suffix(".1.log"))
    return log


def _error_file(scratch: Path, rank: int) -> Path:
    return scratch / f"rank_{rank}.error.json"


def _wait(context: PContext, size: int, scratch: Path, grace: float) -> tuple[int, bool]:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    try:
        result = context.wait(period=0.1)
    except SignalException as asked:
        if asked.sigval not in ASKS:
            context.close(death_sig=signal.SIGKILL, timeout=5)
            return 128 + asked.sigval, True
        ends = time.monotonic() + grace
        try:
            context.close(death_sig=asked.sigval, timeout=grace)
        except SignalException:  # asked again
            context.close(death_sig=signal.SIGKILL, timeout=5)
        if time.monotonic() > ends:
            tell_killed(grace, "checkpoint.grace")
            return KILLED, True
        return Stopped.status, True
    if not result.is_failed():
        return 0, True
    codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
    records = {rank: _read_record(_error_file(scratch, rank)) for rank in codes}
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


def _first_failure(codes: Mapping[int, int], records: Mapping[int, dict[str, Any]]) -> int:
    """The rank whose failure drew the others along: killed by a signal that was not ours, else the earliest recorded."""

    def order(rank: int):
        killed = codes[rank] < 0 and codes[rank] != -signal.SIGTERM
        ended_by_us = codes[rank] == -signal.SIGTERM
        return (not killed, ended_by_us, records[rank].get("time", float("inf")), rank)

    return min(codes, key=order)


def _read_record(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or cut off by the rank's death
        return {}


def _describe_failure(rank: int, size: int, code: int, stderr: str, stdout: str, scratch: Path) -> str:
    if code < 0:
        how = f"was killed by {signal.strsignal(-code) or f'signal {-code}'}"
        how += " (out of memory?)" if code == -signal.SIGKILL else ""
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
def _signals_restored() -> Iterator[None]:
    """Elastic takes these signals over when it starts processes; afterwards they do again what they did."""
    taken = (*ASKS, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
