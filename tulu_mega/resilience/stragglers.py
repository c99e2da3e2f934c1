"""Which rank is the slowest, by how much, and whether it is so for long.

A rank's own time (`pace`) is compared with the median of the ranks that do the same work. (NVIDIA's Resiliency Extension compares
with the fastest rank.) megatron-core's `StragglerDetector` is not used: it knows CUDA alone, times blocks that hold collectives,
and listens on a port of every interface for whoever turns it on or off.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from tulu_mega.config import StragglerSettings
from tulu_mega.distributed.collectives import gathered_at_lead
from tulu_mega.resilience.pace import Pace, gauge


@dataclass(frozen=True)
class Slowest:
    """The rank that is the furthest behind."""

    rank: int
    host: str
    times: float
    """its time / the median's"""
    waiting: float
    """share of its time that it waited for a CPU"""
    warnings: list[str] = field(default_factory=list)
    """of ranks that are behind for long, for people"""

    @property
    def figures(self) -> dict[str, float | int | str]:
        """What metrics.jsonl has of it."""
        return {"slowest_rank": self.rank, "slowest_host": self.host, "slowest_times_median": self.times}


class Lineup:
    """All ranks of a world beside each other, on whichever rank looks at them.

    Args:
        settings: how far behind is too far, and how often.
        hosts: by rank.
        alike: by rank, a number that ranks of the same work share; one that nobody shares it with is compared with none.
    """

    def __init__(self, settings: StragglerSettings, hosts: Sequence[str], alike: Sequence[int]):
        self._settings, self._hosts = settings, hosts
        self._groups = [group for kind in sorted(set(alike)) if len(group := [r for r, k in enumerate(alike) if k == kind]) > 1]
        self._in_a_row = [0] * len(hosts)

    def slowest(self, paces: Sequence[Pace]) -> Slowest | None:
        """
        Args:
            paces: by rank, since the last time.

        Returns:
            The rank furthest behind; None where no two ranks are alike, or none has worked.
        """
        spent = [pace.working + pace.waiting for pace in paces]
        times: dict[int, float] = {}
        for ranks in self._groups:
            # of an even number the faster of the two in the middle: of two ranks one would otherwise be half of its own yardstick
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
            paces[rank].waiting / spent[rank],
            [self._warning(each, times[each], paces[each]) for each in times if self._is_long(each)],
        )

    def _is_long(self, rank: int) -> bool:
        count = self._in_a_row[rank]
        return count > 0 and count % self._settings.reports == 0

    def _warning(self, rank: int, times: float, pace: Pace) -> str:
        share = pace.waiting / (pace.working + pace.waiting)
        waits = f"; {share:.0%} of its time it waited for a CPU, which something else uses" if share >= 0.2 else ""
        return (
            f"rank {rank} on {self._hosts[rank]} is slow: {times:.2f} times the median of the ranks that do the same, in "
            f"{self._in_a_row[rank]} reports in a row (train.straggler.factor = {self._settings.factor:g}){waits}"
        )


class Stragglers:
    """Watches this rank's pace, and every few steps, on rank 0, that of all of them.

    Every rank makes it and calls its methods at the same steps.

    Args:
        settings: how often, and what is too slow.
        log_every: steps between console lines.
        device: where the ranks compute.
        stage: this rank's place in the pipeline.
    """

    def __init__(self, settings: StragglerSettings, log_every: int, device: torch.device, stage: int):
        usual = -(-10 // log_every) * log_every
        self._every = usual if settings.every is None else settings.every
        self._device, self._lineup = device, None
        self._gauge = gauge(device) if self._every and dist.get_world_size() > 1 else None
        if self._gauge:
            ranks = gathered_at_lead((socket.gethostname(), stage if self._gauge.by_stage else 0))
            if ranks:
                hosts, alike = zip(*ranks, strict=True)
                self._lineup = Lineup(settings, hosts, alike)

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Around what the ranks are compared by."""
        return self._gauge.working() if self._gauge else contextlib.nullcontext()

    def report(self, step: int) -> Slowest | None:
        """On rank 0 who is the slowest, at the end of a step (from 1) that a report is due after."""
        if not self._gauge or step % self._every:
            return None
        mine = torch.tensor([self._gauge.take()], dtype=torch.float64, device=self._device)
        paces = mine.new_empty(dist.get_world_size(), mine.shape[1])
        dist.all_gather_into_tensor(paces, mine)
        return self._lineup.slowest([Pace(*pace) for pace in paces.tolist()]) if self._lineup else None
