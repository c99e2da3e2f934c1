"""Copies of many boxes as a Triton kernel: a program copies a tile of one box, which a table tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tulu_kernels.buckets.plan import Launch

_WARPS = 8


@dataclass(frozen=True)
class Tables:
    """A launch, on its device."""

    launch: Launch
    lines: Tensor
    box_of: Tensor
    """int32, of every program the box"""

    @classmethod
    def of(cls, launch: Launch, device: torch.device) -> Tables:
        box_of = torch.repeat_interleave(torch.tensor(launch.programs)).int()
        return cls(launch, torch.tensor(launch.lines, dtype=torch.int64).to(device), box_of.to(device))


def copy(sources: Sequence[Tensor], targets: Sequence[Tensor], tables: Tables) -> None:
    """Copies the boxes of one launch, which lie where they lay when it was planned."""
    first = tables.launch.first
    _copy[(len(tables.box_of),)](
        sources[first], targets[first], tables.lines, tables.box_of,
        UNIT=tables.launch.unit, WIDE=tables.launch.wide, INTEGER=targets[first].device.type == "cpu",
        TILE=tables.launch.tile, num_warps=_WARPS,
    )  # fmt: skip


@triton.jit
def _copy(source, target, lines, box_of, UNIT: tl.constexpr, WIDE: tl.constexpr, INTEGER: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0)
    line = lines + tl.load(box_of + program) * 7
    source_place = tl.load(line)
    target_place = tl.load(line + 1)
    columns = tl.load(line + 2)
    source_pitch = tl.load(line + 3)
    target_pitch = tl.load(line + 4)
    size = tl.load(line + 5)
    tile = program - tl.load(line + 6)
    unit = tile * (TILE // UNIT) + tl.arange(0, TILE // UNIT)
    if not WIDE:  # a division of 64 bits is some hundred instructions
        unit = unit.to(tl.int32)
        columns = columns.to(tl.int32)
    row = unit // columns
    column = unit - row * columns
    at = tl.arange(0, UNIT)[None, :]
    inside = (unit < size)[:, None]
    value = tl.load(source + ((source_place + row * source_pitch + column) * UNIT)[:, None] + at, mask=inside, other=0.0)
    if INTEGER:
        value = _converted(value, target.dtype.element_ty)
    to = ((target_place + row * target_pitch + column) * UNIT)[:, None] + at
    tl.store(target + to, value.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _converted(x, kind: tl.constexpr):
    """What a conversion gives, to nearest even, by integer arithmetic: the interpreter cuts off, and loses subnormal numbers."""
    if x.dtype == tl.bfloat16 and kind == tl.float32:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float32 and kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, rounded, (bits >> 16) | 0x40)  # not a number stays none
        x = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x
