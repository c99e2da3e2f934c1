"""Sequences to one packed micro-batch, and a context-parallel rank's share of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Series

import numpy as np
import torch
from torch import Tensor

from tulu_mega.data.packing import Alignment
from tulu_mega.records import IGNORE, PackedBatch, Sequence


def pack(sequences: Iterable[Sequence], align: Alignment, pad_token: int = 0) -> PackedBatch:
    """Lays sequences behind one another (see the picture at :class:`PackedBatch`).

    A sequence is padded to ``align.sequence`` inside its own segment; what the total lacks to ``align.total`` is a segment of
    row -1. No sequence at all gives one padding segment of the least total, so that a rank without work keeps step.
    """
    tokens, labels, positions, ends, rows, bounds = [], [], [], [], [], [0]

    def add(row: int, ids: list[int], targets: list[int], size: int) -> None:
        fill = size - len(ids)
        tokens.append(np.pad(np.asarray(ids, np.int64), (0, fill), constant_values=pad_token))
        # shifted here, inside the sequence: rolling the packed row would make each one predict its neighbour's beginning
        labels.append(np.pad(np.asarray(targets[1:], np.int64), (0, size - max(len(targets) - 1, 0)), constant_values=IGNORE))
        positions.append(np.arange(size))
        trained = np.flatnonzero(np.asarray(targets) != IGNORE)
        ends.append(np.arange(size) == (trained[-1] if len(trained) else -1))
        rows.append(row)
        bounds.append(bounds[-1] + size)

    for sequence in sequences:
        add(sequence.row, sequence.input_ids, sequence.labels, align.padded_sequence(len(sequence.input_ids)))
    rest = align.padded_total(bounds[-1]) - bounds[-1]
    if rest:
        add(-1, [], [], rest)
    labels_T = torch.from_numpy(np.concatenate(labels))
    loss_mask_T = labels_T != IGNORE
    segments_T = torch.repeat_interleave(torch.arange(len(rows)), torch.from_numpy(np.diff(bounds)))
    return PackedBatch(
        tokens_T=torch.from_numpy(np.concatenate(tokens)),
        labels_T=labels_T,
        positions_T=torch.from_numpy(np.concatenate(positions)),
        loss_mask_T=loss_mask_T,
        labelled_N=loss_mask_T.nonzero().squeeze(1),
        segments_T=segments_T,
        ends_T=torch.from_numpy(np.concatenate(ends)),
        cu_seqlens_S1=torch.tensor(bounds, dtype=torch.int32),
        rows_S=torch.tensor(rows, dtype=torch.int64),
        max_seqlen=int(np.diff(bounds).max()),
        trained_S=torch.bincount(segments_T[loss_mask_T], minlength=len(rows)),
    )


def by_token(batch: PackedBatch, values: Mapping[int, Series[float]]) -> Tensor:
    """Each row's values laid at the positions that predict its trained tokens, in order: float32 [T], 0 elsewhere.

    Args:
        batch: a whole pack.
        values: for each of the pack's rows one value a trained token (of a response: a value for each of its tokens).

    Raises:
        ValueError: a row has no values, or not as many as trained tokens.
    """
    laid_T = torch.zeros(len(batch.tokens_T), dtype=torch.float32)
    found: list[np.ndarray] = []
    for row, trained in zip(batch.rows_S.tolist(), batch.trained_S.tolist(), strict=True):
        given = values.get(row, ()) if row >= 0 else ()
        if len(given) != trained:
            raise ValueError(f"row {row} has {trained} trained tokens, but {len(given)} values")
        found.append(np.asarray(given, dtype=np.float32))
    laid_T[batch.loss_mask_T] = torch.from_numpy(np.concatenate(found))
    return laid_T


def context_rows(cu_seqlens_S1: Tensor, rank: int, size: int) -> Tensor:
    """Which rows of a pack a context-parallel rank holds, int64 [T / size] on the CPU, in its order.

    Each segment is cut into ``2 * size`` pieces of equal length, of which the rank has number ``rank`` and number
    ``2 * size - 1 - rank``: under a causal mask every rank then has as much to attend to as any other. It is the order that
    megatron-core's rotary embedding and Transformer Engine's attention expect.

    Args:
        cu_seqlens_S1: boundaries of the whole pack's segments, lengths multiples of ``2 * size``.
    """
    bounds = cu_seqlens_S1.tolist()
    rows = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        piece, rest = divmod(end - begin, 2 * size)
        if rest:
            raise ValueError(f"a segment of {end - begin} tokens does not divide into {2 * size} pieces")
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
    rows = context_rows(batch.cu_seqlens_S1, rank, size)
    per_token = {name: value for name, value in vars(batch).items() if name.endswith("_T") and value is not None}
    share = {name: value[rows] for name, value in per_token.items()}
    return dataclasses.replace(batch, context_rank=rank, labelled_N=share["loss_mask_T"].nonzero().squeeze(1), **share)
