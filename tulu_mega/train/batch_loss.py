"""The loss of a global batch: computed on the device, and read by the host when the device has finished anyway."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_mega.records import LossOutput, ToHost


@dataclass(frozen=True)
class BatchLoss:
    """A global batch's loss, the same on every rank."""

    loss: float
    """sum over the batch / global count"""
    count: int
    metrics: dict[str, float] = field(default_factory=dict)


class ReducedLoss:
    """A global batch's loss on its way to the host; the same on every rank.

    The loss is sent to main memory behind the batch's work. A read waits until the device has come so far; after another wait for
    the device, such as that for the gradient's norm, a read waits no more.

    Args:
        sums: float64, first the ranks that are marked, by mark; then loss and count, and a sum and count for each mean.
        marks: how many marks there are.
        means: names of the means.
        largest: float64, largest values.
        maxima: their names.
    """

    def __init__(self, sums: Tensor, marks: int, means: Sequence[str], largest: Tensor, maxima: Sequence[str]):
        self._sums, self._largest = ToHost(sums), ToHost(largest) if maxima else None
        self._marks, self._means, self._maxima = marks, means, maxima

    def __float__(self) -> float:
        return self.loss

    def read(self) -> BatchLoss:
        """The loss as numbers."""
        return self._read[0]

    @property
    def marks(self) -> tuple[bool, ...]:
        """For each mark, whether it is set on any rank."""
        return self._read[1]

    @property
    def loss(self) -> float:
        """As `BatchLoss.loss`."""
        return self.read().loss

    @property
    def count(self) -> int:
        """As `BatchLoss.count`."""
        return self.read().count

    @property
    def metrics(self) -> dict[str, float]:
        """As `BatchLoss.metrics`."""
        return self.read().metrics

    @functools.cached_property
    def _read(self) -> tuple[BatchLoss, tuple[bool, ...]]:
        values = self._sums.read()
        marks, rest = values[: self._marks], values[self._marks :]
        (loss, count), *pairs = zip(rest[::2], rest[1::2], strict=True)
        metrics = {name: total / max(n, 1) for name, (total, n) in zip(self._means, pairs, strict=True)}
        if self._largest:
            metrics |= dict(zip(self._maxima, self._largest.read(), strict=True))
        return BatchLoss(loss / max(count, 1), int(count), metrics), tuple(mark > 0 for mark in marks)


def reduced(
    outputs: Sequence[LossOutput],
    means: Sequence[str],
    maxima: Sequence[str],
    marks: Sequence[bool],
    device: torch.device,
) -> ReducedLoss:
    """Sums of the ranks that hold losses, to every rank, in one collective; in another the largest values, if any.

    Args:
        outputs: this rank's, of all micro-batches; none on a rank that holds no losses.
        means: the objective's reported means.
        maxima: the objective's reported largest values.
        marks: this rank's, as many on every rank.
    """
    sums = torch.zeros(2 + 2 * len(means), dtype=torch.float64, device=device)
    largest = torch.full((len(maxima),), -math.inf, dtype=torch.float64, device=device)
    for out in outputs:
        pairs = [(out.loss_sum.detach(), out.count), *(out.metrics[name] for name in means)]
        sums += _stacked([x for pair in pairs for x in pair], device)
        if maxima:
            largest = largest.maximum(_stacked([out.largest[name] for name in maxima], device))
    if marks:
        sums = torch.cat([_stacked([float(mark) for mark in marks], device), sums])
    dist.all_reduce(sums)
    if maxima:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return ReducedLoss(sums, len(marks), means, largest, maxima)


def _stacked(values: Sequence[Tensor | float], device: torch.device) -> Tensor:
    return torch.stack([scalar(value, torch.float64, device) for value in values])


def scalar(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a tensor on the device. ``torch.tensor`` of a number would wait for the device."""
    return value.detach().to(device, dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)
