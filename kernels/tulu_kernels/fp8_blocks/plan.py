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

Region = tuple[tuple[int, int], tuple[int, int]]
"""(start, stop) of rows and of columns."""


@dataclass(frozen=True)
class Box:
    """The box ``local`` of a shard is the box ``region`` of the tensor ``name``, which is of ``shape``."""

    name: str
    shape: tuple[int, int]
    region: Region
    local: Region

    @property
    def rows(self) -> int:
        return self.region[0][1] - self.region[0][0]

    @property
    def columns(self) -> int:
        return self.region[1][1] - self.region[1][0]


class NotAligned(ValueError):
    """Some block is spread over several ranks: gather the tensor, then quantize it."""


@dataclass(frozen=True)
class PackPlan:
    """Of one shard; offsets are in bytes of the bucket and in scales."""

    boxes: tuple[Box, ...]
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
        for box, offset, scale in zip(self.boxes, self.offsets, self.scale_offsets, strict=True):
            down, across = -(-box.rows // BLOCK), -(-box.columns // BLOCK)
            row, column = (each.ravel() * BLOCK for each in np.indices((down, across), np.int64))
            line = (
                box.local[0][0] + row, box.local[1][0] + column, np.minimum(box.rows - row, BLOCK),
                np.minimum(box.columns - column, BLOCK), offset + row * box.columns + column, box.columns,
                scale + np.arange(down * across),
            )  # fmt: skip
            lines.append(np.stack(np.broadcast_arrays(*line), 1))
        return np.concatenate(lines)

    @cached_property
    def in_vectors(self) -> bool:
        """Whether sixteen columns at a time are inside a block or outside of it."""
        return all(box.local[1][0] % 16 == 0 and box.columns % 16 == 0 for box in self.boxes)


def plan_pack(boxes: Sequence[Box]) -> PackPlan:
    """Lays boxes out one after another, in the order given.

    Raises:
        NotAligned: a box cuts through a block of its tensor; says which, where and what to do.
        ValueError: a box and its place in the shard differ in shape.
    """
    offsets, scale_offsets, at, scale = [], [], 0, 0
    for box in boxes:
        if any(b - a != d - c for (a, b), (c, d) in zip(box.region, box.local, strict=True)):
            raise ValueError(f"{box.name}: {box.region} of the tensor and {box.local} of the shard differ in shape")
        for axis, ((start, stop), extent) in enumerate(zip(box.region, box.shape, strict=True)):
            if start % BLOCK or (stop % BLOCK and stop != extent):
                raise NotAligned(
                    f"{box.name}: {'rows' if axis == 0 else 'columns'} {start} to {stop} of {extent} cut through blocks of "
                    f"{BLOCK}; gather the tensor before quantizing, or choose a tensor size whose shards are whole blocks"
                )
        offsets.append(at)
        scale_offsets.append(scale)
        at += -(-box.rows * box.columns // _ALIGN) * _ALIGN
        scale += -(-box.rows // BLOCK) * -(-box.columns // BLOCK)
    return PackPlan(tuple(boxes), tuple(offsets), tuple(scale_offsets), at, scale)
