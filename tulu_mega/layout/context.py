"""How context parallelism cuts a pack."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def context_rows(lengths_S: Sequence[int], rank: int, size: int) -> Tensor:
    """Which rows of a pack a context-parallel rank holds, int64 [T / size] on the CPU, in its order.

    Each segment is cut into ``2 * size`` pieces of equal length, of which the rank has number ``rank`` and number
    ``2 * size - 1 - rank``: under a causal mask every rank then has as much to attend to as any other. It is the order that
    megatron-core's rotary embedding and Transformer Engine's attention expect.

    Args:
        lengths_S: of the whole pack's segments, multiples of ``2 * size``.
    """
    rows = []
    for begin, length in zip(itertools.accumulate(lengths_S, initial=0), lengths_S, strict=False):
        piece, rest = divmod(length, 2 * size)
        if rest:
            raise ValueError(f"a segment of {length} tokens does not divide into {2 * size} pieces")
        for number in (rank, 2 * size - 1 - rank):
            rows.append(torch.arange(begin + number * piece, begin + (number + 1) * piece))
    return torch.cat(rows)
