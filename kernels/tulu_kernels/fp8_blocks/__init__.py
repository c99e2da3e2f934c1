"""Weights as E4M3 numbers with a float32 scale for each block of 128 x 128, packed from a trainer's shard without a gather.

    plan         whether a shard's blocks are whole, and where each of them goes; pure
    reference    the arithmetic in torch: the CPU's path, and the oracle of
    blocks       the same as a Triton kernel
"""

from __future__ import annotations

import torch
from torch import Tensor

from tulu_kernels.dispatch import Backend, chosen
from tulu_kernels.fp8_blocks.plan import BLOCK, NotAligned, PackPlan, Piece, plan_pack
from tulu_kernels.fp8_blocks.reference import quantize

__all__ = ["BLOCK", "NotAligned", "PackPlan", "Piece", "pack", "plan_pack", "quantize"]


def pack(weight: Tensor, plan: PackPlan, into: Tensor, scales: Tensor, *, backend: Backend = "auto") -> None:
    """Quantizes a shard's pieces into a bucket, in one launch on a GPU.

    The first call with a plan copies a table to the device; later ones wait for nothing and can be captured in a CUDA graph. Its
    replays need the plan to be there.

    Args:
        weight: the shard, [rows, columns], bf16 or float32, columns adjacent in memory.
        plan: of this shard, see `plan_pack`.
        into: uint8 of at least `plan.bytes`; piece b becomes E4M3 bytes, rows adjacent, from ``plan.offsets[b]`` on.
        scales: float32 of at least `plan.scales`; piece b's, one row of blocks after another, from ``plan.scale_offsets[b]`` on.
            A number is its byte times its block's scale; a NaN makes all of its block NaN.
    """
    if chosen("fp8_blocks", weight.device, backend) == "triton":
        from tulu_kernels.fp8_blocks.blocks import pack_blocks

        pack_blocks(weight, plan, into, scales)
        return
    for piece, offset, scale_offset in zip(plan.pieces, plan.offsets, plan.scale_offsets, strict=True):
        (top, bottom), (left, right) = piece.local_box
        numbers, of_blocks = quantize(weight[top:bottom, left:right])
        into[offset : offset + numbers.numel()] = numbers.view(torch.uint8).flatten()
        scales[scale_offset : scale_offset + of_blocks.numel()] = of_blocks.flatten()
