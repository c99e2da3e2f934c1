"""Sequences to one packed micro-batch, and a context-parallel rank's share of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tulu_mega.data.prefix_sharing import PrefixGroup
from tulu_mega.layout.alignment import Alignment
from tulu_mega.records import IGNORE, PackedBatch, TokenizedRow


def pack(sequences: Iterable[TokenizedRow], align: Alignment, pad_token: int = 0) -> PackedBatch:
    """Lays sequences behind one another (see the picture at :class:`PackedBatch`).

    A sequence is padded to ``align.sequence`` inside its own segment; what the total lacks to ``align.total`` is a segment of
    row -1. No sequence at all gives one padding segment of the least total, so that a rank without work keeps step.
    """
    pack = _Pack(align, pad_token)
    for sequence in sequences:
        pack.add(sequence.row, sequence.input_ids, sequence.labels[1:], ends=sequence.labels)
    return pack.batch()


def pack_prefix_groups(groups: Iterable[PrefixGroup], align: Alignment, pad_token: int = 0) -> PackedBatch:
    """As :func:`pack`, without the tokens that a :class:`~tulu_mega.data.prefix_sharing.PrefixGroup` leaves out.

    Shared tokens are a segment of row -1, right before the segments of those that share them (see `PackedBatch.key_rows_K`).
    """
    pack = _Pack(align, pad_token)
    for group in groups:
        shared, before = group.shared, None
        if shared:
            before = pack.add(-1, group.sequences[0].input_ids[:shared], [])
        for one in group.sequences:
            last, ends = (None, one.labels[shared:]) if group.ends else (-1, [])
            pack.add(one.row, one.input_ids[shared:last], one.labels[shared + 1 :], ends, before)
    return pack.batch()


class _Pack:
    """Segments, one behind the other."""

    def __init__(self, align: Alignment, pad_token: int):
        self.align, self.pad_token = align, pad_token
        self.tokens, self.labels, self.positions, self.ends = [], [], [], []
        self.rows: list[int] = []
        self.bounds = [0]
        self.before: list[int | None] = []

    def add(
        self,
        row: int,
        ids: Sequence[int],
        labels: Sequence[int],
        ends: Sequence[int] = (),
        before: int | None = None,
        least: int = 0,
    ) -> int:
        """Append a segment and return its number.

        Args:
            labels: the token that each token predicts, shifted inside the segment: a shift of the whole pack would make each
                sequence predict its neighbour's beginning.
            ends: labels that are not shifted; a score is read at the last trained one.
            before: the segment whose tokens come before these.
            least: smallest number of tokens of the segment.
        """
        size = max(self.align.padded_sequence(len(ids)), least)
        start = 0 if before is None else self._size(before)
        trained = np.flatnonzero(np.asarray(ends) != IGNORE)
        self.tokens.append(np.pad(np.asarray(ids, np.int64), (0, size - len(ids)), constant_values=self.pad_token))
        self.labels.append(np.pad(np.asarray(labels, np.int64), (0, size - len(labels)), constant_values=IGNORE))
        self.positions.append(np.arange(start, start + size))
        self.ends.append(np.arange(size) == (trained[-1] if len(trained) else -1))
        self.rows.append(row)
        self.bounds.append(self.bounds[-1] + size)
        self.before.append(before)
        return len(self.rows) - 1

    def batch(self) -> PackedBatch:
        """Return the pack, padded to the total that the layout asks for."""
        rest = self.align.padded_total(self.bounds[-1]) - self.bounds[-1]
        if rest:
            self.add(-1, [], [], least=rest)
        labels_T = torch.from_numpy(np.concatenate(self.labels))
        loss_mask_T = labels_T != IGNORE
        sizes = torch.from_numpy(np.diff(self.bounds))
        segments_T = torch.repeat_interleave(torch.arange(len(self.rows)), sizes)
        return PackedBatch(
            tokens_T=torch.from_numpy(np.concatenate(self.tokens)),
            labels_T=labels_T,
            positions_T=torch.from_numpy(np.concatenate(self.positions)),
            loss_mask_T=loss_mask_T,
            labelled_N=loss_mask_T.nonzero().squeeze(1),
            segments_T=segments_T,
            ends_T=torch.from_numpy(np.concatenate(self.ends)),
            cu_seqlens_S1=torch.tensor(self.bounds, dtype=torch.int32),
            rows_S=torch.tensor(self.rows, dtype=torch.int64),
            lengths_S=tuple(sizes.tolist()),
            trained_S=torch.bincount(segments_T[loss_mask_T], minlength=len(self.rows)),
            **self._keys(),
        )

    def _keys(self) -> dict[str, Tensor | tuple[int, ...]]:
        """Return the fields that say which earlier segments a segment's tokens attend to; none where nothing is shared."""
        if not any(before is not None for before in self.before):
            return {}
        rows, counts = [], []
        for segment, before in enumerate(self.before):
            seen = [at for at in (before, segment) if at is not None]
            rows += [np.arange(self.bounds[at], self.bounds[at + 1]) for at in seen]
            counts.append(sum(map(self._size, seen)))
        return {
            "key_rows_K": torch.from_numpy(np.concatenate(rows)),
            "cu_keys_S1": torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
            "key_lengths_S": tuple(counts),
        }

    def _size(self, segment: int) -> int:
        return self.bounds[segment + 1] - self.bounds[segment]


def by_token(batch: PackedBatch, values: Mapping[int, Sequence[float]]) -> Tensor:
    """Place each row's values at the positions that predict its trained tokens, in order: float32 [T], 0 elsewhere.

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

