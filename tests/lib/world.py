"""Worlds of gloo processes for tests: `run(size, function, *args)` calls it on every rank and gathers what it returns; `Started`
worlds can be killed on the way."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
import threading
import traceback
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any

from torch.distributed import TCPStore

WARM = os.environ.get("TULU_MEGA_WARM", "tests.lib.warm")
"""what the fork server imports; `tests.standins.transformer_engine.warm` gives models Transformer Engine's layers"""

CONTEXT = multiprocessing.get_context("forkserver")
"""Makes processes that are forks of one that has imported everything."""
CONTEXT.set_forkserver_preload([WARM])
_BEFORE, _SERVING = dict(os.environ), threading.Event()


def process(function, *args, daemon: bool = False) -> BaseProcess:
    """A process that is not started yet. Whichever test comes first, it has the environment of before all tests."""
    if not _SERVING.is_set():
        _SERVING.set()
        now = dict(os.environ)
        _become(_BEFORE)
        try:
            forkserver.ensure_running()
        finally:
            _become(now)
    return CONTEXT.Process(target=function, args=args, daemon=daemon)


def _become(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def free_port() -> int:
    """A port that nobody listens on, from below the range out of which others are given one when they ask for any."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("100 ports between 20000 and 32000 are all taken")


def _rank_main(rank: int, size: int, port: int, pipe, function, args) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    try:
        pipe.send((True, function(*args)))
    except BaseException as error:
        pipe.send((False, f"rank {rank}: {error!r}\n{traceback.format_exc()}"))
    pipe.close()
    os._exit(0)  # gloo's threads of a failed world must not keep the process


class Started:
    """A world whose ranks are at work."""

    def __init__(self, size: int, function, *args):
        # here: rank 0 might find its port taken by then
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            made = process(_rank_main, rank, size, self._store.port, theirs, function, args)
            made.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(made)

    def results(self, timeout: float = 240) -> list[Any]:
        """What the ranks return, by rank; no process is left.

        Raises:
            AssertionError: with the tracebacks of the ranks that failed or the ranks that did not answer in time.
        """
        results: list[Any] = [None] * len(self._pipes)
        problems = []
        try:
            for rank, pipe in enumerate(self._pipes):
                if not pipe.poll(timeout if not problems else 5):
                    problems.append(f"rank {rank}: no answer within {timeout} s")
                    continue
                try:
                    fine, value = pipe.recv()
                except EOFError:
                    fine, value = False, f"rank {rank}: ended without an answer"
                if fine:
                    results[rank] = value
                else:
                    problems.append(value)
        finally:
            self.kill()
        assert not problems, "\n".join(problems)
        return results

    def end_of(self, rank: int, timeout: float) -> None:
        """Waits for the end of a rank, whatever it ends with; no process is left."""
        self._processes[rank].join(timeout)
        alive = self._processes[rank].is_alive()
        self.kill()
        assert not alive, f"rank {rank}: at work after {timeout} s"

    def kill(self) -> None:
        """Ends all ranks with SIGKILL."""
        for each in self._processes:
            each.kill()
            each.join()


def run(size: int, function, *args, timeout: float = 240) -> list[Any]:
    """Starts a world and waits for its results. Raises as `Started.results`."""
    return Started(size, function, *args).results(timeout)
