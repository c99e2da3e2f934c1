"""Finds the slowest rank, by how much it is slower, and whether it stays so.

A rank's own work time (`work_time`) is compared with the median of the ranks that do the same work. (NVIDIA's Resiliency
Extension compares with the fastest rank.) megatron-core's `StragglerDetector` is not used: it knows CUDA alone, times blocks that
contain collectives, and opens a port on every interface through which anybody may switch it on or off.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from tulu_mega.config import StragglerSettings
from tulu_mega.distributed.collectives import gathered_at_lead
from tulu_mega.records import ToHost, sent
from tulu_mega.resilience.work_time import WorkTime, work_clock

_NOTABLE = 1.1
"""Report the slowest rank on the console only above this multiple of the median; below is noise."""


@dataclass(frozen=True)
class Slowest:
    """The rank that is the furthest behind."""

    rank: int
    host: str
    times: float
    """Its work time divided by the median."""
    waiting: float
    """Share of its work time that it waited for a CPU."""
    warnings: list[str] = field(default_factory=list)
    """One text for each rank that has been behind for long."""

    @property
    def figures(self) -> dict[str, float | int | str]:
        """The rank's entries in metrics.jsonl."""
        return {"slowest_rank": self.rank, "slowest_host": self.host, "slowest_times_median": self.times}

    @property
    def remark(self) -> str:
        """The rank's part of the console line; empty where it is hardly behind."""
        return f"slowest rank {self.rank} ({self.host}) {self.times:.2f}x" if self.times >= _NOTABLE else ""


class Lineup:
    """Compares all ranks of a world, on the one rank that has their work times.

    Args:
        settings: how far behind is too far, and in how many reports.
        hosts: by rank.
        alike: by rank, a number shared by ranks that do the same work. A rank that shares its number with none is not compared.
    """

    def __init__(self, settings: StragglerSettings, hosts: Sequence[str], alike: Sequence[int]):
        self._settings, self._hosts = settings, hosts
        self._groups = [group for kind in sorted(set(alike)) if len(group := [r for r, k in enumerate(alike) if k == kind]) > 1]
        self._in_a_row = [0] * len(hosts)

    def slowest(self, times_R: Sequence[WorkTime]) -> Slowest | None:
        """
        Args:
            times_R: by rank, the work time since the last report.

        Returns:
            The rank furthest behind; None where no two ranks are alike, or none has worked.
        """
        spent = [time.working + time.waiting for time in times_R]
        times: dict[int, float] = {}
        for ranks in self._groups:
            # median_low: with two ranks, a plain median would average in the slow rank itself
            usual = statistics.median_low(spent[rank] for rank in ranks)
            if usual > 0:
                times |= {rank: spent[rank] / usual for rank in ranks}
        if not times:
            return None
        for rank, factor in times.items():
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if factor > self._settings.factor else 0
        rank = max(times, key=times.__getitem__)
        return Slowest(
            rank,
            self._hosts[rank],
            times[rank],
            times_R[rank].waiting / spent[rank],
            [self._warning(each, times[each], times_R[each]) for each in times if self._is_long(each)],
        )

    def _is_long(self, rank: int) -> bool:
        count = self._in_a_row[rank]
        return count > 0 and count % self._settings.reports == 0

    def _warning(self, rank: int, times: float, time: WorkTime) -> str:
        share = time.waiting / (time.working + time.waiting)
        waits = f"; {share:.0%} of its time it waited for a CPU, which something else uses" if share >= 0.2 else ""
        return (
            f"rank {rank} on {self._hosts[rank]} is slow: {times:.2f} times the median of the ranks that do the same, in "
            f"{self._in_a_row[rank]} reports in a row (train.straggler.factor = {self._settings.factor:g}){waits}"
        )


class Stragglers:
    """Measures this rank's work time and, every few steps, compares all ranks on rank 0.

    Every rank makes one and calls its methods at the same steps.

    Args:
        settings: how often ranks are compared, and what is too slow.
        log_every: steps between console lines.
        device: the ranks' device.
        pipeline_rank: this rank's pipeline stage.
    """

    def __init__(self, settings: StragglerSettings, log_every: int, device: torch.device, pipeline_rank: int):
        usual = -(-10 // log_every) * log_every
        self._every = usual if settings.every is None else settings.every
        self._device, self._lineup = device, None
        self._looks: list[Generator[None, None, Slowest | None]] = []
        self._clock = work_clock(device) if self._every and dist.get_world_size() > 1 else None
        if self._clock:
            ranks = gathered_at_lead((socket.gethostname(), pipeline_rank if self._clock.by_pipeline_stage else 0))
            if ranks:
                hosts, alike = zip(*ranks, strict=True)
                self._lineup = Lineup(settings, hosts, alike)

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Wrap the work by which ranks are compared."""
        return self._clock.working() if self._clock else contextlib.nullcontext()

    def report(self, step: int) -> Slowest | None:
        """Return the slowest rank, on rank 0, at the end of a step (from 1) at which a look is over; None otherwise.

        A look begins every so many steps. On GPUs it is over two steps later, so that nobody waits for it: at the end of each
        step what was asked of the device at the end of the one before is there.
        """
        if not self._clock:
            return None
        if step % self._every == 0:
            self._looks.append(self._look())
        found, going = None, []
        for look in self._looks:
            try:
                next(look)
                going.append(look)
            except StopIteration as over:
                found = over.value
        self._looks = going
        return found

    def _look(self) -> Generator[None, None, Slowest | None]:
        """Compare the ranks; where the device is asked, stop until the end of the next step before its answer is read."""
        taken = self._clock.look()
        if self._clock.late:
            yield
        mine = sent(torch.tensor([taken()], dtype=torch.float64), self._device)
        times_R2 = mine.new_empty(dist.get_world_size(), mine.shape[1])
        dist.all_gather_into_tensor(times_R2, mine)
        times = ToHost(times_R2)
        if self._clock.late:
            yield
        return self._lineup.slowest([WorkTime(*each) for each in times.read()]) if self._lineup else None
