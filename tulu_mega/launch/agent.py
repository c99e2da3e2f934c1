"""``python -m tulu_mega.agent TORCHRUN_ARGUMENTS -m tulu_mega COMMAND ...``: torchrun, with an end that tells.

It hands SIGTERM and SIGUSR1 on to the ranks, which save then, and leaves them time for it (``--shutdown-timeout``). Ranks that
end with something for the user to mend are not started again. Exit status: 0 done · 2 the user can mend it · 143 asked to end ·
137 asked to end, and killed when that time was over · otherwise that of the rank that failed first.

Ranks that are started again meet in a store of their own. torchrun would hand them the one it shares with all ranks, which still
holds where the ranks before them listened (pytorch's issues 135712 and 167288).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from tulu_mega.errors import Stopped
from tulu_mega.launch.reporting import AGENT_PID, ASKS, FINAL, KILLED, tell_killed

_HANDLED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
_MENDABLE = 2


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun with arguments of its own; later ones win over ours. Returns the exit status."""
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    os.environ[AGENT_PID] = str(os.getpid())
    parsed = run.parse_args(["--signals-to-handle", _HANDLED, "--shutdown-timeout", "120", *arguments])
    asked_at = _moments()
    try:
        run.run(parsed)
    except SignalException as asked:
        for number in _HANDLED.split(","):  # torchrun's handlers would raise again, out of here
            signal.signal(signal.Signals[number], signal.SIG_IGN)
        if asked.sigval == FINAL:
            return _MENDABLE
        if asked.sigval not in ASKS:
            return 128 + asked.sigval
        if time.monotonic() < asked_at.get(asked.sigval, time.monotonic()) + parsed.shutdown_timeout:
            return Stopped.status
        tell_killed(parsed.shutdown_timeout, "--shutdown-timeout (the scripts: GRACE)")
        return KILLED
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        told = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        print(f"error: rank {rank} failed with exit status {failure.exitcode}: {told}", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except RendezvousError as error:
        why = str(error.__cause__ or error).splitlines()[0]
        print(f"error: the machines lost each other, or never met ({why}); see the first one's log", file=sys.stderr, flush=True)
        return 1
    return 0


def _moments() -> dict[int, float]:
    """When which signal came first, by a clock that only counts; torchrun's handlers, which come later, stay what they are."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    moments: dict[int, float] = {}

    def note() -> None:
        while number := os.read(read, 1):
            moments.setdefault(number[0], time.monotonic())

    threading.Thread(target=note, name="signals", daemon=True).start()
    return moments
