"""The time that a rank itself works, which wall time does not show: in a collective all ranks wait for the slowest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

_SCHEDSTAT = Path("/proc/thread-self/schedstat")
_SIZE, _TIMES = 4096, 8


class WorkTime(NamedTuple):
    """Seconds of one rank."""

    working: float
    """Seconds of computing."""
    waiting: float
    """Seconds of waiting for a CPU although there was work."""


class WorkClock(Protocol):
    """Measures a rank's work time."""

    by_pipeline_stage: bool
    """Whether only ranks of the same pipeline stage do comparable work."""
    late: bool
    """Whether the host would wait for the device if it asked for a work time at once."""

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Wrap the work to be measured."""

    def look(self) -> Callable[[], WorkTime]:
        """Take the work time since the last look; what is returned gives it."""


def work_clock(device: torch.device) -> WorkClock:
    """Make the clock that fits the device."""
    return TimedProduct(device) if device.type == "cuda" else CpuClock()


class CpuClock:
    """Time on a CPU of the calling thread, and its waiting for one, within the measured blocks.

    The training thread computes a step itself. It waits busily for its helper threads, and sleeps in collectives. So its time
    contains neither the slowness of other ranks nor the time for which the process was stopped. The second number of schedstat
    is the time spent waiting for a CPU, which other processes or a container's quota take; it is 0 on systems without schedstat.
    """

    by_pipeline_stage, late = True, False

    def __init__(self) -> None:
        self._sum = WorkTime(0.0, 0.0)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        began = _thread_clock()
        yield
        now = _thread_clock()
        self._sum = WorkTime(self._sum.working + now.working - began.working, self._sum.waiting + now.waiting - began.waiting)

    def look(self) -> Callable[[], WorkTime]:
        taken, self._sum = self._sum, WorkTime(0.0, 0.0)
        return lambda: taken


def _thread_clock() -> WorkTime:
    waited = 0.0
    with contextlib.suppress(OSError, ValueError, IndexError):
        waited = int(_SCHEDSTAT.read_text().split()[1]) / 1e9
    return WorkTime(time.thread_time(), waited)  # schedstat's first number is only as fresh as the last scheduler tick


class TimedProduct:
    """A matrix product, the same on every rank, timed on the GPU right after the step, while the GPU is still hot from it.

    The product is 4,096 x 4,096 in bf16, eight times: 1.1e12 FLOP, 2 ms on an H100. It keeps 64 MiB.

    Args:
        device: a CUDA device.
    """

    by_pipeline_stage, late = False, True

    def __init__(self, device: torch.device):
        drawn = torch.Generator(device).manual_seed(0)  # a generator of its own leaves every other random state alone
        self._factor = torch.randn(_SIZE, _SIZE, generator=drawn, device=device, dtype=torch.bfloat16)
        self._product = torch.empty_like(self._factor)

    def working(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @torch.no_grad()
    def look(self) -> Callable[[], WorkTime]:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.mm(self._factor, self._factor, out=self._product)  # the first product picks and loads the kernel: not measured
        began.record()
        for _ in range(_TIMES):
            torch.mm(self._factor, self._factor, out=self._product)
        ended.record()

        def taken() -> WorkTime:
            if not ended.query():
                ended.synchronize()
            return WorkTime(began.elapsed_time(ended) / 1e3, 0.0)

        return taken
