"""Work that may never return, in threads that nobody waits for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Helper:
    """A thread that does one thing after the other, any of which may never return: the process's end does not wait for it."""

    def __init__(self):
        self._todo: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="helper", daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._todo.put((work, future))
        return future

    def close(self) -> None:
        """What was submitted is still done."""
        self._todo.put(None)

    def _run(self) -> None:
        while (item := self._todo.get()) is not None:
            work, future = item
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del item, work, future  # or they would be kept until there is more to do


def aside(work: Callable[[], Any]) -> Future:
    """Does a single thing in such a thread."""
    helper = Helper()
    future = helper.submit(work)
    helper.close()
    return future
