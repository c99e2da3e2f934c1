"""How long a pipeline takes for a step: 1F1B and interleaved 1F1B, simulated in the order in which megatron-core runs them.

A stage begins a pass when it has ended the one before and the neighbouring stage has ended the pass that feeds it; transfers
cost nothing. Units are those of the costs: FLOPs in give a makespan in FLOPs of one rank.

M micro-batches   S virtual stages (PP x VPP, in the model's order; stage s lives on pipeline rank s mod PP)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import itemgetter


@dataclass(frozen=True)
class Pipeline:
    """A pipeline as the schedule sees it.

    Args:
        ranks: pipeline parallel size.
        chunks: model chunks a rank holds; more than 1 is the interleaved schedule.
        shares: share of a micro-batch's forward pass that each virtual stage does; equal ones when empty.
        backward: cost of a backward pass in forward passes (3 where all activations are recomputed).
    """

    ranks: int = 1
    chunks: int = 1
    shares: tuple[float, ...] = ()
    backward: float = 2.0

    def __post_init__(self) -> None:
        if self.shares and len(self.shares) != self.stages:
            raise ValueError(f"{len(self.shares)} shares for {self.stages} virtual stages")

    @property
    def stages(self) -> int:
        """Virtual stages."""
        return self.ranks * self.chunks

    @property
    def multiple(self) -> int:
        """Return the number that must divide the number of micro-batches."""
        return self.ranks if self.chunks > 1 else 1

    @cached_property
    def _weights(self) -> tuple[float, ...]:
        """Return the costs of the forward and backward pass of every virtual stage, for a micro-batch of cost 1."""
        shares = self.shares or (1 / self.stages,) * self.stages
        whole = sum(shares) * (1 + self.backward)
        return tuple(part for share in shares for part in (share / whole, share * self.backward / whole))

    def makespan(self, costs_M: Sequence[float]) -> float:
        """Time from the first pass to the last for micro-batches in that order.

        Args:
            costs_M: forward and backward of each micro-batch, over all stages.

        Raises:
            ValueError: the interleaved schedule cannot run that number of micro-batches.
        """
        if self.ranks == 1:
            return float(sum(costs_M))
        weights = self._weights
        return _run(self.ranks, self.chunks, len(costs_M), [cost * weight for cost in costs_M for weight in weights])


def stage_shares(layers_S: Sequence[int], layer: float, head: float) -> tuple[float, ...]:
    """Shares of the virtual stages of a model whose output head is on the last one.

    Args:
        layers_S: transformer layers of each virtual stage.
        layer: cost of one layer.
        head: cost of the output head, in the same unit.
    """
    costs = [count * layer for count in layers_S]
    costs[-1] += head
    return tuple(cost / sum(costs) for cost in costs)


def makespan(forward_MS: Sequence[Sequence[float]], backward_MS: Sequence[Sequence[float]], ranks: int, chunks: int = 1) -> float:
    """As :meth:`Pipeline.makespan` for passes of any cost in any stage.

    Raises:
        ValueError: the interleaved schedule cannot run that number of micro-batches.
    """
    cells = [
        cost
        for forward_S, backward_S in zip(forward_MS, backward_MS, strict=True)
        for pair in zip(forward_S, backward_S, strict=True)
        for cost in pair
    ]
    return _run(ranks, chunks, len(forward_MS), cells)


@dataclass(frozen=True)
class Simulation:
    """A step of all data-parallel replicas, which wait for the slowest."""

    makespan: float
    busy: float
    """share of the ranks' time that is work, 0..1: costs / (pipeline ranks x replicas x makespan)"""


def simulate(costs_RM: Sequence[Sequence[float]], pipeline: Pipeline) -> Simulation:
    """A whole step.

    Args:
        costs_RM: for each data-parallel replica, the costs of its micro-batches in order.

    Raises:
        ValueError: the interleaved schedule cannot run that number of micro-batches.
    """
    longest = max(pipeline.makespan(costs_M) for costs_M in costs_RM)
    work = sum(map(sum, costs_RM))
    return Simulation(longest, work / (pipeline.ranks * len(costs_RM) * longest) if longest else 1.0)


def shortest_order(costs_M: Sequence[float], pipeline: Pipeline) -> list[int]:
    """The best of a few orders of a replica's micro-batches: indices into ``costs_M``, the costliest-first order on a tie.

    Without a pipeline any order takes as long, and the costliest goes first: its memory is then asked for first.
    """
    falling = sorted(range(len(costs_M)), key=lambda index: -costs_M[index])
    if pipeline.ranks == 1 or costs_M[falling[0]] == costs_M[falling[-1]]:
        return falling
    rising = falling[::-1]
    hill = rising[::2] + falling[len(falling) % 2 :: 2]  # cheap at both ends: a pipeline fills and drains fastest with these
    return min((falling, rising, hill), key=lambda order: pipeline.makespan([costs_M[index] for index in order]))


def peak_held(rank: int, ranks: int, chunks: int, held_MS: Sequence[Sequence[float]]) -> float:
    """Return the most memory that a pipeline rank holds at once of what forward passes keep for backward passes.

    Args:
        rank: in the pipeline, from 0.
        ranks, chunks: of the pipeline.
        held_MS: memory that each micro-batch keeps in each virtual stage.

    Raises:
        ValueError: the interleaved schedule cannot run that number of micro-batches.
    """
    if chunks > 1 and len(held_MS) % ranks:
        raise ValueError(f"the interleaved schedule runs multiples of {ranks} micro-batches, not {len(held_MS)}")
    held = peak = 0.0
    for m, stage, backward in _rank_order(rank, ranks, chunks, len(held_MS)):
        held += -held_MS[m][stage] if backward else held_MS[m][stage]
        peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class Span:
    """A pass on its rank's line of time."""

    rank: int
    micro_batch: int
    stage: int
    backward: bool
    start: float
    end: float


def timeline(
    forward_MS: Sequence[Sequence[float]], backward_MS: Sequence[Sequence[float]], ranks: int, chunks: int
) -> list[Span]:
    """When every pass runs, in the order in which they can be run through. Arguments and errors of :func:`makespan`."""
    count, stages = len(forward_MS), ranks * chunks
    program = _program(ranks, chunks, count)
    ended, spans = [0.0], []
    for cell, own, feeding in zip(program.places, program.own, program.feeding, strict=True):
        pair, backward = divmod(cell, 2)
        m, stage = divmod(pair, stages)
        start = max(ended[own], ended[feeding])
        ended.append(start + (backward_MS if backward else forward_MS)[m][stage])
        spans.append(Span(stage % ranks, m, stage, bool(backward), start, ended[-1]))
    return spans


def _run(ranks: int, chunks: int, count: int, cells: list[float]) -> float:
    """Compute the end of every pass, each after the passes that it waits for, and return the last end.

    Args:
        cells: cost of pass ``(m x S + s) x 2 + (1 if backward)``.
    """
    if not count:
        return 0.0
    program = _program(ranks, chunks, count)
    ended = [0.0]
    add = ended.append
    for cost, own, feeding in zip(program.cells(cells), program.own, program.feeding, strict=True):
        ready, fed = ended[own], ended[feeding]
        add((ready if ready > fed else fed) + cost)
    return max(ended)


@dataclass(frozen=True)
class _Program:
    """All passes of a pipeline, in an order in which they can be run through once. Position 0 stands for the beginning."""

    cells: itemgetter
    """picks the costs of all passes in this order"""
    places: tuple[int, ...]
    """index of each pass's cost in that order"""
    own: tuple[int, ...]
    """for each pass, the position of the pass its rank ran before"""
    feeding: tuple[int, ...]
    """for each pass, the position of the pass whose result it takes"""


@lru_cache(maxsize=256)
def _program(ranks: int, chunks: int, count: int) -> _Program:
    if chunks > 1 and count % ranks:
        raise ValueError(f"the interleaved schedule runs multiples of {ranks} micro-batches, not {count}")
    stages = ranks * chunks
    waiting = [_rank_order(rank, ranks, chunks, count) for rank in range(ranks)]
    last = [0] * ranks
    position: dict[tuple[int, int, int], int] = {}  # (micro-batch, stage, backward) -> place in the program
    cells, own, feeding = [], [], []
    left = 2 * stages * count
    at = [0] * ranks
    while left:
        before = left
        for rank, passes in enumerate(waiting):
            while at[rank] < len(passes):
                m, stage, backward = passes[at[rank]]
                source = _source(m, stage, backward, stages)
                if source is not None and source not in position:
                    break
                cells.append((m * stages + stage) * 2 + backward)
                own.append(last[rank])
                feeding.append(position[source] if source else 0)
                position[m, stage, backward] = last[rank] = len(cells)
                at[rank] += 1
                left -= 1
        if left == before:
            raise RuntimeError(f"the schedule of {ranks} ranks, {chunks} chunks, {count} micro-batches waits for itself")
    return _Program(itemgetter(*cells), tuple(cells), tuple(own), tuple(feeding))


def _source(m: int, stage: int, backward: int, stages: int) -> tuple[int, int, int] | None:
    """The pass whose result another takes; None for the first stage's forward pass."""
    if not backward:
        return (m, stage - 1, 0) if stage else None
    return (m, stage + 1, 1) if stage + 1 < stages else (m, stage, 0)


def _rank_order(rank: int, ranks: int, chunks: int, count: int) -> list[tuple[int, int, int]]:
    """A rank's passes as (micro-batch, virtual stage, backward): forward ones to warm up, one of each in turn, the rest backward.

    The order of megatron-core 0.16 (`pipeline_parallel/schedules.py`): interleaved, groups of as many micro-batches as there
    are ranks go through chunk after chunk, backwards in the opposite order of chunks.
    """
    group = ranks if chunks > 1 else count
    table = [(m, chunk) for start in range(0, count, group) for chunk in range(chunks) for m in range(start, start + group)]
    forward = [(m, chunk * ranks + rank, 0) for m, chunk in table]
    backward = [(m, (chunks - 1 - chunk) * ranks + rank, 1) for m, chunk in table]
    ahead = ranks - rank - 1 if chunks == 1 else (ranks - rank - 1) * 2 + (chunks - 1) * ranks
    ahead = min(ahead, len(table))
    order = forward[:ahead]
    for after, back in zip(forward[ahead:], backward, strict=False):
        order += [after, back]
    return order + backward[len(table) - ahead :]
