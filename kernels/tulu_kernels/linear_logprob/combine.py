"""What the shards of a vocabulary know of a row, made into the row's log-probability and entropy.

A shard's statistics of a row of logits z are four float32 numbers:

    peak     largest z; the lowest float32 where the shard holds padding only
    total    sum of exp(z - peak)
    target   the label's z, 0 where the label is another shard's
    moment   sum of exp(z - peak) (z - peak), for entropies; else 0
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min
"""Stands for minus infinity, which would make 0 * inf of an empty shard."""


@dataclass(frozen=True)
class Row:
    """Of the whole vocabulary, N rows each, the same bits on every rank."""

    peak_N: Tensor
    """largest logit"""
    log_total_N: Tensor
    """log of the sum of exp(z - peak)"""
    logp_N: Tensor
    entropy_N: Tensor
    """right where the shards gave moments"""


def empty_shard(rows: int, device: torch.device) -> Tensor:
    """Statistics [N, 4] of a shard without a real column."""
    stats_N4 = torch.zeros(rows, 4, dtype=torch.float32, device=device)
    stats_N4[:, 0] = LOWEST
    return stats_N4


def combine(stats_RN4: Tensor) -> Row:
    """Differences from the peak are taken before anything is summed, so that logits of 10,000 lose no digits.

    Args:
        stats_RN4: float32, of R shards in the order of their ranks, in which they are also added.
    """
    peak_RN, total_RN, target_RN, moment_RN = stats_RN4.unbind(-1)
    peak_N = peak_RN.amax(0)
    below_RN = peak_RN - peak_N
    share_RN = below_RN.exp()
    total_N = _in_order(share_RN * total_RN)
    log_total_N = total_N.log()
    logp_N = (_in_order(target_RN) - peak_N) - log_total_N
    entropy_N = log_total_N - _in_order(share_RN * (moment_RN + below_RN * total_RN)) / total_N
    return Row(peak_N, log_total_N, logp_N, entropy_N)


def mass(stats_N4: Tensor, row: Row) -> Tensor:
    """Probability [N] that lies in the shard with these statistics."""
    return (stats_N4[:, 0] - row.peak_N - row.log_total_N).exp() * stats_N4[:, 1]


def _in_order(values_RN: Tensor) -> Tensor:
    return functools.reduce(torch.add, values_RN.unbind(0))
