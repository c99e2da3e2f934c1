"""How context parallelism cuts a pack."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tulu_mega.records import PackedBatch


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


def context_share(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """A context-parallel rank's share of a pack whose sequences are aligned to ``2 * size``; labels are shifted already.

    Args:
        batch: the whole pack, on the CPU.
    """
    if size == 1:
        return batch
    rows = context_rows(batch.lengths_S, rank, size)
    share = {name: value[rows] for name, value in vars(batch).items() if name.endswith("_T")}
    columns = {name: value[rows] if name.endswith("_T") else value for name, value in batch.columns.items()}
    labelled_N = share["loss_mask_T"].nonzero().squeeze(1)
    return dataclasses.replace(batch, context_rank=rank, labelled_N=labelled_N, columns=columns, **share)
