"""Work on ranges of rows in several processes, results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from tulu_mega.errors import UserError

R = TypeVar("R")


def cores() -> int:
    """Cores this process may use, which in a container or job are fewer than the machine's (Linux tells)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[int, int], R], rows: int, chunk: int, workers: int) -> Iterator[tuple[int, R]]:
    """``work(start, stop)`` over all rows, a chunk at a time.

    Args:
        work: sent to each process once, so it may carry much; picklable where there are several.
        rows: how many.
        chunk: rows at once.
        workers: processes; 1 is this one.

    Yields:
        The number of rows of a chunk and what became of them, in the rows' order, worked at most a few chunks ahead.

    Raises:
        UserError: a process died.
    """
    ranges = [(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
    if workers == 1 or len(ranges) < 2:
        for start, stop in ranges:
            yield stop - start, work(start, stop)
        return
    # spawn: this process may hold threads and process groups by now, which a fork would not survive
    pool = ProcessPoolExecutor(min(workers, len(ranges)), multiprocessing.get_context("spawn"), _keep, (work,))
    waiting: deque[tuple[int, Future[R]]] = deque()
    try:
        for start, stop in ranges:
            with _uninterrupted():
                future = pool.submit(_do, start, stop)
            waiting.append((stop - start, future))
            if len(waiting) > 4 * workers:
                size, future = waiting.popleft()
                yield size, future.result()
        while waiting:
            size, future = waiting.popleft()
            yield size, future.result()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for want of memory; use fewer workers (data.workers, workers)") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Start processes that ignore interrupts. A terminal sends an interrupt to all processes; this process ends the others, and
    each of them would print a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_kept: Callable[[int, int], Any] | None = None


def _keep(work: Callable[[int, int], Any]) -> None:
    global _kept
    _kept = work


def _do(start: int, stop: int) -> Any:
    assert _kept is not None
    return _kept(start, stop)
