"""Where boxes lie in a bucket, and the tables by which one launch copies all boxes of a kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes that a box's place in a bucket is a multiple of."""
VECTOR = 8
"""Elements that are copied at once where everything is a multiple of them."""
TILE, ODD_TILE = 8192, 1024
"""Elements that a program copies, `VECTOR` at once and one at a time: of these a thread has an index each, so it takes fewer."""


@dataclass(frozen=True)
class BucketPlan:
    """Boxes of one type, side by side in a flat bucket."""

    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    """bytes"""
    nbytes: int

    def views(self, bucket: Tensor) -> list[Tensor]:
        """The boxes in a bucket, without a copy.

        Args:
            bucket: uint8, contiguous, of at least `nbytes`.
        """
        return [
            bucket[at : at + math.prod(shape) * self.dtype.itemsize].view(self.dtype).view(shape)
            for shape, at in zip(self.shapes, self.offsets, strict=True)
        ]


def plan_bucket(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> BucketPlan:
    """Lays boxes out one after another, each at a multiple of `ALIGNMENT`."""
    offsets, at = [], 0
    for shape in shapes:
        offsets.append(at)
        at += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return BucketPlan(dtype, tuple(tuple(shape) for shape in shapes), tuple(offsets), at)


@dataclass(frozen=True)
class Launch:
    """Boxes of one kind: equal types, and whether all of their extents and places are multiples of `VECTOR` elements."""

    first: int
    """the pair from whose beginnings places are counted"""
    unit: int
    """elements that the lines count in, 1 or `VECTOR`"""
    tile: int
    """elements that a program copies"""
    wide: bool
    """whether a box has more of these than 32 bits count"""
    lines: tuple[tuple[int, int, int, int, int, int, int], ...]
    """of each box: place of source and target, columns, distance between rows of source and target, size, its first program"""
    programs: tuple[int, ...]
    """of each box"""


def launches(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Launch]:
    """Boxes that lie in a row in source and target are taken for one row.

    Raises:
        ValueError: a box of more than two dimensions, or whose last one is not adjacent in memory.
    """
    kinds: dict[tuple, list[tuple[int, tuple[int, ...]]]] = {}
    for at, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if not source.numel():
            continue
        rows, columns = _extents(source)
        pitches = [_pitch(box, rows, columns) for box in (source, target)]
        if pitches == [columns, columns]:
            rows, columns = 1, rows * columns
            pitches = [columns, columns]
        aligned = all(number % VECTOR == 0 for number in (columns, *pitches)) and all(
            box.data_ptr() % (VECTOR * box.element_size()) == 0 for box in (source, target)
        )
        kinds.setdefault((source.dtype, target.dtype, aligned), []).append((at, (columns, *pitches, rows * columns)))
    return [_launch(sources, targets, VECTOR if aligned else 1, boxes) for (_, _, aligned), boxes in kinds.items()]


def _launch(sources: Sequence[Tensor], targets: Sequence[Tensor], unit: int, boxes: list[tuple[int, tuple[int, ...]]]) -> Launch:
    first, tile = boxes[0][0], TILE if unit > 1 else ODD_TILE
    wide = any(numbers[-1] // unit > 2**31 - tile for _, numbers in boxes)
    lines, programs, begun = [], [], 0
    for at, numbers in boxes:
        places = (
            (side[at].data_ptr() - side[first].data_ptr()) // (side[at].element_size() * unit) for side in (sources, targets)
        )
        lines.append((*places, *(number // unit for number in numbers), begun))
        programs.append(-(-numbers[-1] // tile))
        begun += programs[-1]
    return Launch(first, unit, tile, wide, tuple(lines), tuple(programs))


def _extents(box: Tensor) -> tuple[int, int]:
    if box.dim() > 2:
        raise ValueError(f"a box of shape {list(box.shape)}: expected at most two dimensions; view it as two")
    return (1, box.numel()) if box.dim() < 2 else (box.shape[0], box.shape[1])


def _pitch(box: Tensor, rows: int, columns: int) -> int:
    """Elements from one row to the next."""
    if columns > 1 and box.stride(-1) != 1:
        raise ValueError(f"elements of a row are {box.stride(-1)} apart, expected 1: pass boxes of contiguous tensors")
    return box.stride(0) if rows > 1 else columns
