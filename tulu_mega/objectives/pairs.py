"""Values of segments, side by side for each pair."""

from __future__ import annotations

from torch import Tensor

from tulu_mega.records import PackedBatch


def sides(batch: PackedBatch, *values_S: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Chosen and rejected, [P] each, of every value; P pairs are in the pack, none where it is padding only."""
    real = len(batch.rows_S) // 2 * 2  # padding is one segment, the last: known without asking a GPU
    return [value_S[:real].view(-1, 2).unbind(1) for value_S in values_S]
