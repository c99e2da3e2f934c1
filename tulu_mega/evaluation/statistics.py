"""Scores and how sure one can be of them: Wilson's interval, the bootstrap over problems, pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054
"""Standard normal quantile of a two-sided 95% interval."""
RESAMPLES = 1000
FEW = 5
"""Problems below which a group is not drawn from by itself: of one, every draw is the same."""


@dataclass(frozen=True)
class Estimate:
    """A score with its 95% interval. ``interval`` says how it was found: ``wilson`` or ``bootstrap``."""

    value: float
    low: float
    high: float
    interval: str


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion (Wilson 1927).

    Raises:
        ValueError: not 0 <= correct <= total, or total is 0.
    """
    if not (0 <= correct <= total and total > 0):
        raise ValueError(f"got {correct} of {total}; expected a count of at most the total, and a total above 0")
    p, square = correct / total, Z * Z
    middle = (p + square / (2 * total)) / (1 + square / total)
    half = Z / (1 + square / total) * math.sqrt(p * (1 - p) / total + square / (4 * total * total))
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == total else middle + half)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that one of k responses is right, estimated without bias from more (Chen et al. 2021, arXiv 2107.03374).

    ``1 - C(n - c, k) / C(n, k)`` for n samples of which c are correct.

    Raises:
        ValueError: fewer samples than k.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {samples} samples with {correct} correct; expected at least {k} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def estimate(sums: Sequence[float], counts: Sequence[int], groups: Sequence[str] | None = None) -> Estimate:
    """The ratio of sums to counts over problems; with groups, the mean of the groups' ratios.

    Where every problem counts once and is right or wrong, and there are no groups, the interval is Wilson's; otherwise it is
    the percentile bootstrap over problems (drawn within groups, for groups are fixed and problems a sample; where a group has
    fewer than 5, which would hardly vary, over the problems of all groups, each weighted as in the mean).

    Args:
        sums: what each problem earned.
        counts: what each problem could earn.
        groups: each problem's group, for a mean over groups.

    Raises:
        ValueError: no problems, or nothing to earn in a group.
    """
    earned, possible = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if len(earned) == 0 or possible.sum() == 0:
        raise ValueError("nothing was judged")
    if groups is None and (possible == 1).all() and np.isin(earned, (0, 1)).all():
        correct = int(earned.sum())
        return Estimate(correct / len(earned), *wilson(correct, len(earned)), "wilson")
    kinds = np.zeros(len(earned), np.int64) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    members = [np.flatnonzero(kinds == kind) for kind in range(kinds.max() + 1)]
    value = float(np.mean([earned[group].sum() / possible[group].sum() for group in members]))
    if min(map(len, members)) < FEW:
        weights = 1 / np.array([possible[group].sum() for group in members])[kinds]
        earned, possible, members = earned * weights, possible * weights, [np.arange(len(earned))]
    draw = np.random.default_rng(0)  # the same figures for the same samples
    resampled = np.zeros(RESAMPLES)
    for group in members:
        for number in range(RESAMPLES):
            chosen = group[draw.integers(0, len(group), len(group))]
            resampled[number] += earned[chosen].sum() / max(possible[chosen].sum(), 1e-12) / len(members)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(value, float(low), float(high), "bootstrap")
