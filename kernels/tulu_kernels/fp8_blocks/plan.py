"""Where every 128 x 128 block of a shard goes, or why the shard must be gathered first.

A block's scale is made of all of the block. A rank can quantize what it holds by itself exactly where the boxes it holds of each
tensor begin and end at the tensor's block boundaries; queries, keys and values that lie interleaved in the shard, and gate above
up, are boxes of several tensors and come out in the tensors' order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    def table(self) -> list[tuple[int, int, int, int, int, int, int]]:
        """A line for each block: first row and column in the shard, rows, columns, byte of its first number, bytes between its
        rows, its scale."""
        lines = []
        for box, offset, scale in zip(self.boxes, self.offsets, self.scale_offsets, strict=True):
            top, left = box.local[0][0], box.local[1][0]
            for row in range(0, box.rows, BLOCK):
                for column in range(0, box.columns, BLOCK):
                    extent = min(BLOCK, box.rows - row), min(BLOCK, box.columns - column)
                    lines.append((top + row, left + column, *extent, offset + row * box.columns + column, box.columns, scale))
                    scale += 1
        return lines


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
