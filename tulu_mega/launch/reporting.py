"""What a process tells the user and whoever started it: problems, an orderly end, a crash."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tulu_mega.errors import Stopped
from tulu_mega.json_input import read_json_text

LAUNCHER_PID = "TULU_MEGA_LAUNCHER_PID"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun gives one to each of its ranks and shows what is in it; so do we
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


def record_crash(error: BaseException) -> None:
    """In a rank: notes an exception that nobody expected, so that the launcher can tell which rank failed first."""
    if "RANK" in os.environ:
        _record(f"{type(error).__name__}: {error}", {"callstack": "".join(traceback.format_exception(error))})


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
