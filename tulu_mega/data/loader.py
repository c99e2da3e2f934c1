"""The packed micro-batches of every step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tulu_mega.config import DataSettings, TrainSettings
from tulu_mega.data.batch import pack
from tulu_mega.data.packing import plan_step
from tulu_mega.data.store import TokenStore
from tulu_mega.layout.alignment import Alignment
from tulu_mega.layout.cost import Cost
from tulu_mega.layout.schedule import Pipeline, simulate
from tulu_mega.records import PackedBatch

_NO_PIPELINE = Pipeline()


@dataclass(frozen=True)
class StepData:
    """One rank's share of a global batch, and figures of the whole batch, which every rank agrees on."""

    step: int
    micro_batches: list[PackedBatch]
    """this rank's; as many on every rank"""
    rows: list[int]
    """the global batch's sequences of the store, in drawing order"""
    tokens: int
    """real tokens of the global batch"""
    supervised_tokens: int
    """tokens of the global batch that are trained"""
    packed_tokens: int
    """tokens all ranks together compute, padding included"""
    schedule_efficiency: float
    """share of the ranks' time that is work while the slowest pipeline runs, by simulation, 0..1"""

    @property
    def sequences(self) -> int:
        """Sequences of the global batch."""
        return len(self.rows)

    @property
    def padding(self) -> float:
        """Share of what is computed that is padding."""
        return 1 - self.tokens / self.packed_tokens


class PackedLoader:
    """The micro-batches of each step, a function of the step's number alone: a resumed run asks for the next step.

    Epochs follow one another without a seam; rows do not depend on the layout. ``train.steps`` draws full batches for as long as
    it takes; ``train.epochs`` ends with the last row, so that the last batch may be short.

    Args:
        store: the tokenised rows.
        train: steps or epochs, global batch, micro-batches.
        data: shuffle and lengths.
        seed: decides the order of every epoch.
        align: what the layout asks of lengths.
        data_parallel_rank: whose micro-batches :meth:`batches` gives.
        data_parallel_size: ranks that share a global batch.
        cost: cost of a sequence by its length, to level packs and ranks.
        pipeline: decides the number of micro-batches and their order.
        pad_token: fills padding; nobody attends to it.
        columns: columns of :class:`PackedBatch` by segment: name -> value of each sequence of the store, float64.
    """

    def __init__(
        self,
        store: TokenStore,
        train: TrainSettings,
        data: DataSettings,
        seed: int,
        align: Alignment,
        data_parallel_rank: int,
        data_parallel_size: int,
        cost: Cost = float,
        pipeline: Pipeline = _NO_PIPELINE,
        pad_token: int = 0,
        columns: Mapping[str, np.ndarray] | None = None,
    ):
        self._store, self._train, self._align, self._cost, self._pad_token = store, train, align, cost, pad_token
        self._rank, self._ranks, self._pipeline = data_parallel_rank, data_parallel_size, pipeline
        self._columns = columns or {}
        self._capacity = data.pack_length or data.max_length * store.width
        self._count = len(store) // store.width
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(self._count, seed, epoch, data.shuffle))
        self._drawn = _drawn(train, self._count)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packing")
        self._next: tuple[int, Future[StepData]] | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return steps_of(self._train, self._count)

    def rows(self, step: int) -> list[int]:
        """Sequences of the store in the global batch of a step, counted from 0; those of a pair follow one another.

        Raises:
            IndexError: the run has no such step.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        size, count, width = self._train.global_batch, self._count, self._store.width
        begin, end = step * size, min((step + 1) * size, self._drawn)
        drawn: list[int] = []
        while begin < end:
            epoch, first = divmod(begin, count)
            part = self._order(epoch)[first : first + end - begin]
            drawn += part.tolist()
            begin += len(part)
        return drawn if width == 1 else [row * width + side for row in drawn for side in range(width)]

    def batches(self, step: int) -> StepData:
        """The packed micro-batches of a step; the following step is packed in the background meanwhile.

        Raises:
            IndexError: the run has no such step.
            UserError: the step's sequences do not fit into ``train.micro_batches``.
        """
        waiting, self._next = self._next, None
        data = waiting[1].result() if waiting and waiting[0] == step else self._pack(step)
        if step + 1 < self.steps:
            self._next = (step + 1, self._thread.submit(self._pack, step + 1))
        return data

    def __iter__(self) -> Iterator[StepData]:
        return (self.batches(step) for step in range(self.steps))

    def check(self) -> None:
        """Plan every step (about a millisecond each), to find a step that does not fit before the run.

        Raises:
            UserError: as :meth:`batches`.
        """
        for step in range(self.steps):
            self._plan(self.rows(step))

    def _plan(self, rows: list[int]) -> list[list[list[int]]]:
        lengths = self._store.lengths[rows].tolist()
        return plan_step(
            lengths,
            self._ranks,
            self._capacity,
            self._align,
            self._train.micro_batches,
            self._cost,
            multiple=self._pipeline.multiple,
            pipeline=self._pipeline,
            together=self._store.width,
        )

    def _pack(self, step: int) -> StepData:
        rows = self.rows(step)
        plan = self._plan(rows)
        lengths = self._store.lengths[rows]
        sizes = [self._align.padded_sequence(length) for length in lengths.tolist()]
        costs = [float(self._cost(size)) for size in sizes]
        simulation = simulate([[sum(costs[index] for index in bin_) for bin_ in bins] for bins in plan], self._pipeline)
        return StepData(
            step=step,
            micro_batches=[self._batch([rows[index] for index in bin_]) for bin_ in plan[self._rank]],
            rows=rows,
            tokens=int(lengths.sum()),
            supervised_tokens=int(self._store.supervised[rows].sum()),
            packed_tokens=sum(self._align.padded_total(sum(sizes[index] for index in bin_)) for bins in plan for bin_ in bins),
            schedule_efficiency=simulation.busy,
        )

    def _batch(self, rows: list[int]) -> PackedBatch:
        batch = pack((self._store[row] for row in rows), self._align, self._pad_token)
        return batch.with_columns(**{name: by_segment(batch, values) for name, values in self._columns.items()})


def steps_of(train: TrainSettings, count: int) -> int:
    """Optimizer steps of a run.

    Args:
        count: rows, or pairs, that it trains on.
    """
    return -(-_drawn(train, count) // train.global_batch)


def _drawn(train: TrainSettings, count: int) -> int:
    """Rows, or pairs, that a run draws."""
    # rounded first: 0.1 epochs of 30 rows are 3.0000000000000004
    return train.steps * train.global_batch if train.steps else max(1, math.ceil(round(train.epochs * count, 6)))


def by_segment(batch: PackedBatch, values: np.ndarray) -> Tensor:
    """float64 [S], each sequence's value; 0 for padding."""
    rows = batch.rows_S.numpy()
    return torch.from_numpy(np.where(rows >= 0, values[rows], 0.0).astype(np.float64))


def epoch_order(count: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """int64 [count], every row once, in the order of an epoch."""
    if not shuffle:
        return np.arange(count)
    # RandomState: NumPy keeps its streams for good, so a run can be resumed under another NumPy; Generator's may change
    bits = np.random.MT19937(np.random.SeedSequence([seed % 2**64, epoch]))
    return np.random.RandomState(bits).permutation(count)
