"""Block-scaled E4M3 as a Triton kernel: one program a block, read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tulu_kernels.fp8_blocks.plan import BLOCK, PackPlan
from tulu_kernels.fp8_blocks.reference import LARGEST, LEAST

_WARPS = 8


def pack_blocks(weight: Tensor, plan: PackPlan, into: Tensor, scales: Tensor) -> None:
    """See `tulu_kernels.fp8_blocks.pack`."""
    if weight.stride(1) != 1:
        raise ValueError(f"columns of the weight are {weight.stride(1)} apart, expected 1: pass a contiguous shard")
    if not plan.pieces:
        return
    table = _table(plan, weight.device)
    aligned = weight.stride(0) % 8 == 0 and plan.in_vectors
    _pack[(len(table),)](
        weight, table, into, scales, weight.stride(0) // 8 if aligned else weight.stride(0), LEAST, LARGEST,
        ALIGNED=aligned, INTEGER=weight.device.type == "cpu", BLOCK=BLOCK, num_warps=_WARPS,
    )  # fmt: skip


def _table(plan: PackPlan, device: torch.device) -> Tensor:
    """The plan's lines, made and copied at the first call: hundreds of thousands for a model's update, the same every time."""
    if device not in plan.on_devices:
        plan.on_devices[device] = torch.from_numpy(plan.table()).to(device)  # waits for it: later calls may be on other streams
    return plan.on_devices[device]


@triton.jit
def _pack(
    weight, table, into, scales, stride, LEAST: tl.constexpr, LARGEST: tl.constexpr, ALIGNED: tl.constexpr,
    INTEGER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = table + tl.program_id(0) * 7
    top = tl.load(line)
    left = tl.load(line + 1)
    rows = tl.load(line + 2)
    columns = tl.load(line + 3)
    first = tl.load(line + 4)
    pitch = tl.load(line + 5)
    which = tl.load(line + 6)
    r = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    if ALIGNED:  # sixteen columns at a time are inside or outside, and begin at multiples of 16
        within = c < columns // 16 * 16
        source = (top + r) * (stride * 8) + (left // 16 * 16)
        target = (first // 16 * 16) + r * (pitch // 16 * 16)
    else:
        within = c < columns
        source = (top + r) * stride + left
        target = first + r * pitch
    inside = (r < rows) & within
    w = tl.load(weight + source + c, mask=inside, other=0.0).to(tl.float32)
    # bits of magnitudes are ordered as these are and NaN's are the largest; a maximum of floats would leave NaNs out
    magnitude = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.max(magnitude, 1), 0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.where(largest < LEAST, LEAST, largest), LARGEST)
    scaled = w * tl.div_rn(1.0, scale)
    tl.store(scales + which, scale)
    if INTEGER:
        numbers = _e4m3(scaled)
    else:
        numbers = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(into + target + c, numbers, mask=inside)


@triton.jit
def _e4m3(x):
    """Bytes of the nearest E4M3 numbers, ties to even, by integer arithmetic; |x| at most 448 and a rounding, or NaN.

    Normal numbers: 3 of float32's 23 bits of mantissa stay, the exponent's bias goes from 127 to 7. Below 2^-6 numbers lie 2^-9
    apart; adding 2^14, whose float32 neighbours lie as far apart, rounds to them.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    rounded = tl.where(magnitude < 0x3C800000, small, normal - (120 << 3))
    return (sign | tl.where(magnitude > 0x7F800000, 0x7F, tl.minimum(rounded, 0x7E))).to(tl.uint8)
