"""``python -m tulu_mega.agent TORCHRUN_ARGUMENTS -m tulu_mega COMMAND ...``: torchrun, with an exit status that says how the run
ended.

It hands SIGTERM and SIGUSR1 on to the ranks, which save then, and leaves them time for it (``--shutdown-timeout``). Ranks that
end with something for the user to mend are not started again. Exit status: 0 done · 2 the user can mend it · 143 asked to end ·
137 asked to end, and killed when that time was over · otherwise that of the rank that failed first.

Ranks that are started again meet in a store of their own. torchrun would hand them the one it shares with all ranks, which still
holds where the ranks before them listened (pytorch's issues 135712 and 167288).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tulu_mega.errors import Stopped, UserError
from tulu_mega.launch import gathering, route
from tulu_mega.launch.reporting import AGENT_PID, ASKS, FINAL, KILLED, ignored, tell_killed

if TYPE_CHECKING:
    from torch.distributed import Store

_HANDLED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
_MENDABLE = 2


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun with arguments of its own; later ones win over ours. Returns the exit status."""
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings of names that DNS does not have, one for each connection
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    os.environ[AGENT_PID] = str(os.getpid())
    handled = _HANDLED.replace("SIGHUP,", "") if ignored(signal.SIGHUP) else _HANDLED
    parsed = run.parse_args(["--signals-to-handle", handled, "--shutdown-timeout", "120", *arguments])
    asked_at = _moments()
    _RESTARTS.listen()
    try:
        store = _met(parsed)  # as long as torchrun needs it
        run.run(parsed)
        del store
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        return _MENDABLE
    except KeyboardInterrupt:  # before torchrun has handlers
        return 130
    except SignalException as asked:
        for number in _HANDLED.split(","):  # torchrun's handlers would raise again, out of here
            signal.signal(signal.Signals[number], signal.SIG_IGN)
        if asked.sigval == FINAL:
            return _MENDABLE
        if asked.sigval not in ASKS:
            told = "interrupted: what was done since the last checkpoint is lost; SIGTERM saves first"
            print(told, file=sys.stderr, flush=True)
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


def _met(parsed: argparse.Namespace) -> Store | None:
    """Looks at torchrun's arguments, completes them by this machine's address and interface, and waits for the other machines.

    Raises:
        UserError: the machines cannot meet.
    """
    local = str(parsed.nproc_per_node)
    if not local.isalpha() and not (local.isdigit() and int(local)):
        raise UserError(f"GPUS_PER_NODE = {local}: expected the number of this machine's processes, at least 1")
    least, _, most = str(parsed.nnodes).partition(":")
    if not least.isdigit() or int(least) < 1 or not (most or least).isdigit():
        raise UserError(f"NNODES = {parsed.nnodes}: expected the number of machines")
    if parsed.standalone or parsed.rdzv_backend != "c10d" or not parsed.rdzv_endpoint:
        return None
    master, _, port = parsed.rdzv_endpoint.rpartition(":")
    master = master.strip("[]")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT = {port}: expected a number up to 65535, the same on all machines")
    if not master:
        raise UserError("MASTER_ADDR is empty; give the address of the machine with NODE_RANK 0")
    parsed.local_addr = route.own_address(master, int(port), parsed.local_addr)
    if name := route.interface(parsed.local_addr):  # gloo asks what the host name resolves to: on Debian the loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    asked = parsed.rdzv_conf.replace(" ", "").lower().split(",")
    host = "is_host=true" in asked
    place = gathering.Place(master, int(port), parsed.rdzv_id, int(least), host)
    if most in ("", least) and int(least) == 1 and host:
        gathering.check_port(place)  # of another run on this machine, mostly
    if most not in ("", least) or int(least) < 2 or not (host or "is_host=false" in asked):
        return None  # how many come, or where they meet, is left to torchrun
    return gathering.gathered(place)


class _Restarts(logging.Filter):
    """Prints a line when torchrun starts ranks again, in place of torchrun's log record."""

    def listen(self) -> None:
        logger = logging.getLogger("torch.distributed.elastic.agent.server.api")
        logger.setLevel(logging.INFO)
        logger.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        if "will restart worker group" not in text:
            return record.levelno > logging.INFO
        if "attempts left" in text:
            _, _, left, most = record.args
            print(f"the ranks are started again ({most - left + 1} of {most} times)", file=sys.stderr, flush=True)
        else:
            print("the ranks are started again with those of another machine", file=sys.stderr, flush=True)
        return False


_RESTARTS = _Restarts()


def _moments() -> dict[int, float]:
    """Return a dictionary that gets the time of each signal's first arrival, by a monotonic clock. torchrun's handlers, which are
    installed later, still run."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    moments: dict[int, float] = {}

    def note() -> None:
        while number := os.read(read, 1):
            moments.setdefault(number[0], time.monotonic())

    threading.Thread(target=note, name="signals", daemon=True).start()
    return moments
