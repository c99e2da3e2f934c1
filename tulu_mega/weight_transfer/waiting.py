"""How transports wait: for a GPU to have filled a buffer, and for work that may never return."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from tulu_mega.weight_transfer.protocol import SLOTS


class FillEvents:
    """Says of each buffer on a GPU when it is full; a buffer on a CPU is full when the thread that fills it says so."""

    def __init__(self, device: torch.device):
        self._device = device
        self._events = [torch.cuda.Event(blocking=True) for _ in range(SLOTS)] if device.type == "cuda" else []

    def note(self, slot: int) -> None:
        """Marks a buffer's end of filling: what was asked of the GPU until now is part of it."""
        if self._events:
            self._events[slot].record(torch.cuda.current_stream(self._device))

    def wait(self, slot: int) -> None:
        """Has the host wait until a buffer is full, in whichever thread."""
        if self._events:
            with torch.cuda.device(self._device):  # a new thread is on GPU 0, where it would leave a context
                self._events[slot].synchronize()


class DaemonWorker:
    """A thread that runs calls one after another. A call may never return: the process ends without waiting for the thread."""

    def __init__(self):
        self._todo: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="weights", daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Future:
        """Queue a call for the thread, behind the calls submitted before."""
        future: Future = Future()
        self._todo.put((work, future))
        return future

    def close(self) -> None:
        """Ends the thread once it has done what was submitted."""
        self._todo.put(None)

    def _run(self) -> None:
        while (item := self._todo.get()) is not None:
            work, future = item
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del item, work, future  # or they would be kept until there is more to do


def in_daemon_thread(work: Callable[[], Any]) -> Future:
    """Run one call in a thread of its own; the process ends without waiting for it."""
    worker = DaemonWorker()
    future = worker.submit(work)
    worker.close()
    return future
