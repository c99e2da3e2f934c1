"""How long a rank itself works, which its wall time does not tell: in a collective all wait for the slowest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

_SCHEDSTAT = Path("/proc/thread-self/schedstat")
_SIZE, _TIMES = 4096, 8


class Pace(NamedTuple):
    """Seconds, of this rank alone."""

    working: float
    waiting: float
    """for a CPU, although there was work"""


class Gauge(Protocol):
    """What a rank's pace is measured by."""

    by_stage: bool
    """whether only ranks of the same pipeline stage are alike in what is measured"""

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Around what the rank's pace is to be that of."""

    def take(self) -> Pace:
        """The pace since it was taken last."""


def gauge(device: torch.device) -> Gauge:
    """What fits the device."""
    return TimedProduct(device) if device.type == "cuda" else CpuClock()


class CpuClock:
    """Time of the calling thread on a CPU, and waiting for one, in the blocks it is entered for.

    The thread that trains computes a step itself, with helpers that it waits for busily, and sleeps in collectives: others'
    slowness is not in it, nor is time for which the process was stopped. Waiting for a CPU is the second number of schedstat,
    0 on systems without it: what other processes, or a container's quota, take.
    """

    by_stage = True

    def __init__(self) -> None:
        self._sum = Pace(0.0, 0.0)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        began = _thread_clock()
        yield
        now = _thread_clock()
        self._sum = Pace(self._sum.working + now.working - began.working, self._sum.waiting + now.waiting - began.waiting)

    def take(self) -> Pace:
        taken, self._sum = self._sum, Pace(0.0, 0.0)
        return taken


def _thread_clock() -> Pace:
    waited = 0.0
    with contextlib.suppress(OSError, ValueError, IndexError):
        waited = int(_SCHEDSTAT.read_text().split()[1]) / 1e9
    return Pace(time.thread_time(), waited)  # the first number there is as old as the last tick


class TimedProduct:
    """A matrix product, the same on every rank, timed on the GPU right after its work, while it is as hot as that makes it.

    4,096 x 4,096 in bf16, eight times: 1.1e12 FLOP, 2 ms on an H100; 64 MiB are kept for it.

    Args:
        device: a CUDA device.
    """

    by_stage = False

    def __init__(self, device: torch.device):
        drawn = torch.Generator(device).manual_seed(0)  # nobody else's random state moves
        self._factor = torch.randn(_SIZE, _SIZE, generator=drawn, device=device, dtype=torch.bfloat16)
        self._product = torch.empty_like(self._factor)

    def working(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @torch.no_grad()
    def take(self) -> Pace:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.mm(self._factor, self._factor, out=self._product)  # what picks and loads the kernel is not measured
        began.record()
        for _ in range(_TIMES):
            torch.mm(self._factor, self._factor, out=self._product)
        ended.record()
        ended.synchronize()
        return Pace(began.elapsed_time(ended) / 1e3, 0.0)
