"""Reports of a process to the user and to its parent: problems, an orderly end, a crash."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import stat
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tulu_mega.errors import Stopped
from tulu_mega.outside.json_input import read_json_text

LAUNCHER_PID = "TULU_MEGA_LAUNCHER_PID"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun gives one to each of its ranks and shows what is in it; so do we
_AGENT_SECONDS = 5.0
_TURN_SECONDS = 2.0
AGENT_PID = "TULU_MEGA_AGENT_PID"
"""Environment variable: the process of `tulu_mega.agent` that started this rank."""
KILLED = 137
"""Exit status of ranks that were asked to end and were killed because they took too long."""
FINAL = signal.SIGUSR2
"""Signal from a rank to that agent: the error is not transient, do not start ranks again."""
ASKS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that ask a run to end (SIGUSR1 is for Slurm's --signal, SIGHUP a terminal that was closed). They are passed on to the
ranks, which may save. Other signals end the ranks at once."""
HANGUP_LOG = "TULU_MEGA_HANGUP_LOG"
"""Environment variable: the file that gets output once the terminal is closed."""


def report(problems: Sequence[str]) -> None:
    """Tells the user about problems, once for the whole world.

    In a rank they go to its error file, which the launcher (ours, torchrun) shows; under torchrun rank 0 prints them too. Under
    `tulu_mega.agent` the first rank of each node prints them, and has the agent end without starting ranks again.
    """
    rank, agent = os.environ.get("RANK"), _agent()
    if rank is not None:
        _record(problems[0] if problems else "", {"problems": list(problems)})
        if started_by_launcher() and os.path.exists(os.environ.get(ERROR_FILE, "")):  # it is not where its disk is full
            return
        if agent:  # a problem that all have is told by the first, and the agent ends the others
            time.sleep(_TURN_SECONDS * int(os.environ["LOCAL_RANK"]))
        elif rank != "0" and ERROR_FILE in os.environ:
            return
    prefix = "" if rank in (None, "0") else f"[rank {rank}] "
    for problem in problems:
        print(f"{prefix}error: {problem}", file=sys.stderr, flush=True)
    if agent:
        os.kill(agent, FINAL)
        time.sleep(_AGENT_SECONDS)  # it ends us; before it was told, it would take our end for a failure


def report_stop(stopped: Stopped) -> None:
    """Report, in a rank that ended when asked to, that it did: once for the whole world, to the user and to the ranks' parent.

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
    """Report that ranks which were asked to end were killed before they saved.

    Args:
        seconds: time that they had.
        setting: the setting with this time.
    """
    print(
        f"error: the ranks did not end within {seconds:g} s and were killed; what was done since the last checkpoint is lost. "
        f"{setting} sets how long they have; it should cover a step and a save",
        file=sys.stderr,
        flush=True,
    )


def record_crash(error: BaseException) -> None:
    """Record an unexpected exception of this rank, so that the launcher can tell which rank failed first."""
    if "RANK" in os.environ:
        _record(f"{type(error).__name__}: {error}", {"callstack": "".join(traceback.format_exception(error))})


class Terminal:
    """Standard output and error where a terminal shows them, or where they go to a pipe whose reader ends with it (``| tee``).
    What is written there once the terminal was closed ends whoever writes.

    Args:
        log: the file that gets what is said then; what `HANGUP_LOG` names when None, else nothing does.
    """

    def __init__(self, log: str | None = None):
        self._log = log or os.environ.get(HANGUP_LOG, os.devnull)
        self._had = _has_terminal()  # ranks have none of their own: the launcher's shows what they say
        self._shown = [each for each in (1, 2) if os.isatty(each) or _is_pipe(each)]

    def closed(self) -> None:
        """Call it on SIGHUP, which somebody may have sent who has no part in a terminal: what is open still is left alone."""
        gone = self._had and not _has_terminal()
        shown = [each for each in self._shown if gone or not (os.isatty(each) or _is_read(each))]
        for file in (self._log, os.devnull) if shown else ():
            with contextlib.suppress(OSError):
                to = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                for descriptor in shown:
                    os.dup2(to, descriptor)
                os.close(to)
                return


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _is_read(descriptor: int) -> bool:
    """Return whether a pipe has a reader."""
    if not _is_pipe(descriptor):
        return False
    looked = select.poll()
    looked.register(descriptor, 0)
    return not any(event & select.POLLERR for _, event in looked.poll(0))


def _has_terminal() -> bool:
    """Whether this process belongs to a terminal that is open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def ignored(number: signal.Signals) -> bool:
    """Whether whoever started this process has it ignore a signal, as `nohup` does with SIGHUP."""
    return signal.getsignal(number) == signal.SIG_IGN


def lost_another(error: BaseException) -> str:
    """What to say of a rank whose neighbour is gone: a line, with the place where it waited; empty where something else failed.

    The neighbour's own end says why, and a traceback of every rank that is well would bury it.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ""
    chain, each = [], error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__
    told = next((each for each in chain if isinstance(each, RuntimeError) and any(sign in str(each) for sign in _GONE)), None)
    if told is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}tulu_mega{os.sep}" in frame.filename]
    where = f" in {own[-1].name} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    why = str(told).strip().splitlines()[0]
    return f"rank {os.environ.get('RANK')} lost another rank{where}; that one's end says why ({why})"


_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "NCCL communicator was aborted")
"""Parts of the messages of gloo and NCCL about a peer that is gone."""


def _record(message: str, details: dict[str, Any]) -> None:
    """Writes the error file in the form torchrun reads; the first error of a rank stays."""
    file = os.environ.get(ERROR_FILE)
    if file is None or os.path.exists(file):
        return
    now = time.time()
    extra = {"timestamp": str(int(now)), "py_callstack": details.get("callstack", message)}
    content = {"message": {"message": message, "extraInfo": extra}, "time": now, **details}
    with contextlib.suppress(OSError):
        whole = Path(f"{file}.part")  # elastic stumbles over half a file
        whole.write_text(json.dumps(content), encoding="utf-8")
        whole.replace(file)


def started_by_launcher() -> bool:
    return os.environ.get(LAUNCHER_PID) == str(os.getppid())


def _agent() -> int:
    """The process that started this rank, if that is `tulu_mega.agent`; else 0."""
    parent = os.getppid()
    return parent if os.environ.get(AGENT_PID) == str(parent) else 0


def read_record(file: Path) -> dict[str, Any]:
    """What a rank noted in its error file; empty where there is none, or where the rank's death cut it off."""
    try:
        found = read_json_text(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
