"""Sequences to one packed micro-batch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from tulu_mega.data.packing import Alignment
from tulu_mega.records import IGNORE, PackedBatch, Sequence


def pack(sequences: Iterable[Sequence], align: Alignment, pad_token: int = 0) -> PackedBatch:
    """Lays sequences behind one another (see the picture at :class:`PackedBatch`).

    A sequence is padded to ``align.sequence`` inside its own segment; what the total lacks to ``align.total`` is a segment of
    row -1. No sequence at all gives one padding segment of the least total, so that a rank without work keeps step.
    """
    tokens, labels, positions, rows, bounds = [], [], [], [], [0]

    def add(row: int, ids: list[int], targets: list[int], size: int) -> None:
        fill = size - len(ids)
        tokens.append(np.pad(np.asarray(ids, np.int64), (0, fill), constant_values=pad_token))
        # shifted here, inside the sequence: rolling the packed row would make each one predict its neighbour's beginning
        labels.append(np.pad(np.asarray(targets[1:], np.int64), (0, size - max(len(targets) - 1, 0)), constant_values=IGNORE))
        positions.append(np.arange(size))
        rows.append(row)
        bounds.append(bounds[-1] + size)

    for sequence in sequences:
        add(sequence.row, sequence.input_ids, sequence.labels, align.padded_sequence(len(sequence.input_ids)))
    rest = align.padded_total(bounds[-1]) - bounds[-1]
    if rest:
        add(-1, [], [], rest)
    labels_T = torch.from_numpy(np.concatenate(labels))
    return PackedBatch(
        tokens_T=torch.from_numpy(np.concatenate(tokens)),
        labels_T=labels_T,
        positions_T=torch.from_numpy(np.concatenate(positions)),
        loss_mask_T=labels_T != IGNORE,
        cu_seqlens_S1=torch.tensor(bounds, dtype=torch.int32),
        rows_S=torch.tensor(rows, dtype=torch.int64),
        max_seqlen=int(np.diff(bounds).max()),
    )
