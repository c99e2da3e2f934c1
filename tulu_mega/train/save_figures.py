"""What a save took: its peak of main memory and its seconds, told in metrics.jsonl in the line of the step that was saved."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tulu_mega.train.metrics import step_of

_EVERY = 0.005
"""Seconds between two looks at this process's memory."""


@dataclass(frozen=True)
class SaveFigures:
    """Figures of one save, the largest over all ranks."""

    step: int
    seconds: float
    """from its beginning until it counted"""
    waited: float
    """Seconds of these in which training stood still."""
    memory: int | None
    """bytes of main memory at the peak, above what the rank held at the beginning; None where the system does not tell. While
    training goes on during the save, what it takes beyond that is among them."""


class SaveWatch:
    """Watches this process while it saves: a thread looks at its resident memory, begun here and ended by :meth:`end`. Where the
    process came to hold more than ever before, the kernel has the peak, and what the thread missed of it does not matter.
    """

    def __init__(self) -> None:
        self._began, self.waited = time.perf_counter(), 0.0
        self._before = self._peak = resident_memory()
        self._most_before = most_memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="save memory", daemon=True)
        if self._before is not None:
            self._thread.start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block's seconds among those that training stands still."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - began

    def end(self) -> tuple[float, float, float]:
        """Ends the thread.

        Returns:
            seconds, seconds waited, and bytes of the peak above the beginning, -1 where the system does not tell.
        """
        self._over.set()
        if self._before is None:
            return time.perf_counter() - self._began, self.waited, -1.0
        self._thread.join()
        if (most := most_memory()) > self._most_before:
            self._peak = max(self._peak, most)
        return time.perf_counter() - self._began, self.waited, float(self._peak - self._before)

    def _look(self) -> None:
        while not self._over.wait(_EVERY):
            self._peak = max(self._peak, resident_memory() or 0)


def resident_memory() -> int | None:
    """Bytes of main memory that this process holds; None where the system does not tell."""
    try:
        with open("/proc/self/statm") as told:
            return int(told.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def most_memory() -> int:
    """The most bytes of main memory that this process ever held; 0 where the system does not tell."""
    try:
        with open("/proc/self/status") as told:
            return next(int(line.split()[1]) * 1024 for line in told if line.startswith("VmHWM:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return 0


def tell(file: Path, figures: SaveFigures) -> None:
    """Adds a save's figures to the line of its step in metrics.jsonl, if it has one. A full disk costs no more than them, nor
    does a number in that line which JSON has not."""
    told = {"save_seconds": figures.seconds, "save_waited_seconds": figures.waited}
    if figures.memory is not None:
        told["save_memory_gib"] = figures.memory / 2**30
    try:
        lines = file.read_bytes().splitlines(keepends=True)
        at = next((at for at in reversed(range(len(lines))) if step_of(lines[at]) == figures.step), None)
        if at is None:  # of a step that an earlier start of the run did
            return
        line = json.dumps(json.loads(lines[at]) | told, allow_nan=False)
        # of a step that was saved twice, as one is before which a run stops, the figures may be shorter the second time
        line = line.ljust(len(lines[at].decode()) - 1) + "\n"
        _replace_end(file, b"".join(lines[at:]), b"".join([line.encode(), *lines[at + 1 :]]))
    except (OSError, ValueError) as error:
        what = f"step {figures.step}: what its save took cannot be added to {file}"
        why = error.strerror if isinstance(error, OSError) else error
        print(f"warning: {what} ({why})", file=sys.stderr, flush=True)


def _replace_end(file: Path, old: bytes, new: bytes) -> None:
    """Writes longer bytes in the place of a file's last ones, at once, so that whoever reads meanwhile, or after a kill, finds
    whole lines. The file stays the same one, since it is open elsewhere.
    """
    with open(file, "r+b", buffering=0) as opened:
        start = opened.seek(-len(old), os.SEEK_END)
        try:
            if opened.write(new) < len(new):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            opened.seek(start)
            opened.write(old)
            opened.truncate()
            raise
