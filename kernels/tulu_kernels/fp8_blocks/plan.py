"""Where every 128 x 128 block of a shard goes, or why the shard must be gathered first.

A block's scale is made of all of the block. A rank can quantize what it holds by itself exactly where the boxes it holds of each
tensor begin and end at the tensor's block boundaries; queries, keys and values that lie interleaved in the shard, and gate above
up, are boxes of several tensors and come out in the tensors' order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

BLOCK = 128
_ALIGN = 16

Box = tuple[tuple[int, int], tuple[int, int]]
"""(start, stop) of rows and of columns."""


@dataclass(frozen=True)
class Piece:
    """The box ``local_box`` of a shard is the box ``box`` of the tensor ``name``, which is of ``shape``."""

    name: str
    shape: tuple[int, int]
    box: Box
    local_box: Box

    @property
    def rows(self) -> int:
        return self.box[0][1] - self.box[0][0]

    @property
    def columns(self) -> int:
        return self.box[1][1] - self.box[1][0]


class NotAligned(ValueError):
    """Some block is spread over several ranks: gather the tensor, then quantize it."""


@dataclass(frozen=True)
class PackPlan:
    """Of one shard; offsets are in bytes of the bucket and in scales."""

    pieces: tuple[Piece, ...]
    offsets: tuple[int, ...]
    """multiples of 16"""
    scale_offsets: tuple[int, ...]
    bytes: int
    scales: int
    on_devices: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """`table` as `blocks` keeps it on each device, as long as the plan lives"""

    def table(self) -> np.ndarray:
        """int64 [blocks, 7], of each block: first row and column in the shard, rows, columns, byte of its first number, bytes
        between its rows, its scale."""
        lines = [np.empty((0, 7), np.int64)]
        for piece, offset, scale in zip(self.pieces, self.offsets, self.scale_offsets, strict=True):
            down, across = -(-piece.rows // BLOCK), -(-piece.columns // BLOCK)
            row, column = (each.ravel() * BLOCK for each in np.indices((down, across), np.int64))
            line = (
                piece.local_box[0][0] + row, piece.local_box[1][0] + column, np.minimum(piece.rows - row, BLOCK),
                np.minimum(piece.columns - column, BLOCK), offset + row * piece.columns + column, piece.columns,
                scale + np.arange(down * across),
            )  # fmt: skip
            lines.append(np.stack(np.broadcast_arrays(*line), 1))
        return np.concatenate(lines)

    @cached_property
    def in_vectors(self) -> bool:
        """Whether sixteen columns at a time are inside a block or outside of it."""
        return all(piece.local_box[1][0] % 16 == 0 and piece.columns % 16 == 0 for piece in self.pieces)


def plan_pack(pieces: Sequence[Piece]) -> PackPlan:
    """Lays pieces out one after another, in the order given.

    Raises:
        NotAligned: a piece cuts through a block of its tensor; says which, where and what to do.
        ValueError: a piece and its place in the shard differ in shape.
    """
    offsets, scale_offsets, at, scale = [], [], 0, 0
    for piece in pieces:
        if any(b - a != d - c for (a, b), (c, d) in zip(piece.box, piece.local_box, strict=True)):
            raise ValueError(f"{piece.name}: {piece.box} of the tensor and {piece.local_box} of the shard differ in shape")
        for axis, ((start, stop), extent) in enumerate(zip(piece.box, piece.shape, strict=True)):
            if start % BLOCK or (stop % BLOCK and stop != extent):
                raise NotAligned(
                    f"{piece.name}: {'rows' if axis == 0 else 'columns'} {start} to {stop} of {extent} cut through blocks of "
                    f"{BLOCK}; gather the tensor before quantizing, or choose a tensor size whose shards are whole blocks"
                )
        offsets.append(at)
        scale_offsets.append(scale)
        at += -(-piece.rows * piece.columns // _ALIGN) * _ALIGN
        scale += -(-piece.rows // BLOCK) * -(-piece.columns // BLOCK)
    return PackPlan(tuple(pieces), tuple(offsets), tuple(scale_offsets), at, scale)
