"""Values of segments, side by side for each pair."""

from __future__ import annotations

from torch import Tensor

from tulu_mega.records import PackedBatch


def sides(value_S: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Chosen and rejected, [P] each, of a pack of P pairs (none in a pack of padding)."""
    real = int((batch.rows_S >= 0).sum())
    chosen_P, rejected_P = value_S[:real].view(-1, 2).unbind(1)
    return chosen_P, rejected_P
