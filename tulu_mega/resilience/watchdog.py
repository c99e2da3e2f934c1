"""Ends a run that hangs, after a report of where it hangs and which rank the others wait for.

Every rank marks its progress (:meth:`Watchdog.at`). A thread of its own publishes the last mark through the store. A rank that
has set no mark within the time-out prints the Python stack of each of its threads, reads from torch's flight recorder which
collective it waits in, gathers the accounts of the other ranks, prints them, and ends its process. The launcher may then start
the ranks again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from tulu_mega.distributed import topology
from tulu_mega.errors import HUNG
from tulu_mega.launch import reporting
from tulu_mega.resilience import hang_report
from tulu_mega.resilience.hang_report import Account

STATUS = HUNG


class Watchdog:
    """Watches this rank while it is entered.

    Args:
        timeout: seconds that may pass between two marks; 0 watches nothing.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._interval = min(timeout / 10, 5.0)
        self._prefix, self._what, self._marked = "", "start", time.monotonic()
        self._beat = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._timeout:
            self._rank, self._size = dist.get_rank(), dist.get_world_size()
            self._store = dist.PrefixStore("tulu_mega/watchdog", topology.store())
            self._store.set_timeout(timedelta(seconds=10))
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join()

    def step(self, number: int) -> None:
        """Mark that a step (from 1) begins; later marks are part of it."""
        self._prefix = f"step {number}: "
        self.at("data")

    def at(self, what: str) -> None:
        """Mark that this rank makes progress and begins something new."""
        self._what, self._marked = what, time.monotonic()
        if self._thread:  # if a thread never gives Python's lock back, this timer in C still ends the process
            faulthandler.dump_traceback_later(2 * self._timeout + 60, exit=True)

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            idle = time.monotonic() - self._marked
            if idle > self._timeout:
                self._end(idle)
            with contextlib.suppress(Exception):  # a lost store must not disturb the run
                self._tell(self._account())

    def _account(self) -> Account:
        self._beat += 1
        return Account(self._prefix + self._what, self._beat)

    def _tell(self, account: Account) -> None:
        self._store.set(str(self._rank), account.dumps())

    def _end(self, idle: float) -> None:
        stuck = dataclasses.replace(self._account(), stack=hang_report.main_stack())
        limit = f"watchdog.timeout = {self._timeout:g}"
        self._say(f"no progress for {idle:.0f} s ({limit}) in {stuck.at!r}; the stack of every thread:")
        with contextlib.suppress(Exception):  # standard error may be no file
            faulthandler.dump_traceback(all_threads=True, file=sys.__stderr__)
        lines = _within(4 * self._interval + 20, lambda: self._gathered(stuck))
        for line in lines:
            self._say(line)
        reporting.record_crash(TimeoutError("; ".join(["the run hung", *lines])))
        sys.stderr.flush()
        os._exit(STATUS)

    def _gathered(self, stuck: Account) -> list[str]:
        waits, begun = hang_report.collectives(topology.recorded_collectives(), topology.groups())
        stuck = dataclasses.replace(stuck, waits=waits, begun=begun)
        first = self._accounts()
        end = time.monotonic() + 2 * self._interval + 1  # a running rank beats within this time
        while True:
            stuck = dataclasses.replace(stuck, beat=stuck.beat + 1)
            self._tell(stuck)
            now = self._accounts()
            if len(now) == self._size and all(account.stack for account in now.values()):
                return hang_report.together(now, [])
            if time.monotonic() > end:
                beats = {rank: account.beat for rank, account in first.items()}
                silent = [r for r in range(self._size) if r not in now or (now[r].beat == beats.get(r) and not now[r].stack)]
                return hang_report.together(now, silent)
            time.sleep(0.2)

    def _accounts(self) -> dict[int, Account]:
        ranks = [rank for rank in range(self._size) if self._store.check([str(rank)])]
        return {rank: Account.loads(text) for rank, text in zip(ranks, self._store.multi_get(list(map(str, ranks))), strict=True)}

    def _say(self, line: str) -> None:
        print(f"watchdog: rank {self._rank}: {line}", file=sys.stderr, flush=True)


def _within(seconds: float, work: Callable[[], list[str]]) -> list[str]:
    """Return the result of work that may hang or fail: it runs in a thread that is waited for this long at most."""
    lines = [f"the other ranks could not be asked within {seconds:.0f} s"]

    def attempt() -> None:
        try:
            lines[:] = work()
        except Exception as error:
            lines[:] = [f"the other ranks could not be asked: {type(error).__name__}: {error}"]

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return list(lines)
