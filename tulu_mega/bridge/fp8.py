"""FP8 on both sides of the bridge: parameters that a model keeps in FP8, and weights that go to servers as FP8 blocks.

FP8 parameters are tensors of Transformer Engine's that pass for bf16 and hold bytes and scales. Reading a part of one gives bf16
numbers; a part of one cannot be written.

FP8 blocks are quantized by the ranks that hold the weights, or else once gathered. A matrix of a layer's projections becomes two
tensors, as block-quantized checkpoints have them and vLLM's ``fp8`` loaders expect them: E4M3 numbers under its own name, and
float32 scales of blocks of 128 x 128 under that name with ``_scale_inv`` behind it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from tulu_kernels import fp8_blocks
from tulu_kernels.dispatch import Backend
from tulu_kernels.fp8_blocks import BLOCK, NotAligned, PackPlan, pack, plan_pack

from tulu_mega.bridge.box import Box
from tulu_mega.bridge.rules import Piece

NUMBERS = torch.float8_e4m3fn
"""Type of the blocks' numbers."""
SCALES = torch.float32
"""Type of their scales."""


def in_fp8(parameter: Tensor) -> bool:
    """Whether a parameter is kept in FP8. Nothing of Transformer Engine is imported for it."""
    return hasattr(parameter, "quantize_")


def values(parameter: Tensor) -> Tensor:
    """Return a parameter's values as an ordinary tensor outside autograd. Only an FP8 parameter is copied."""
    return parameter.dequantize(dtype=parameter.dtype).detach() if in_fp8(parameter) else parameter.detach()


@contextlib.contextmanager
def unrounded(parameter: Tensor) -> Iterator[Tensor]:
    """Give a tensor to write a parameter's values into, in any order. At the end an FP8 parameter is cast from it.

    An optimizer that is built later starts from the values as they were before the cast: Transformer Engine has a place for them,
    in main memory (``preserve_high_precision_init_val``), until then.
    """
    if not in_fp8(parameter):
        yield parameter
        return
    kept = parameter.get_high_precision_init_val() if hasattr(parameter, "get_high_precision_init_val") else None
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device) if kept is None else kept
    yield whole
    parameter.quantize_(whole.to(parameter.device))


def is_quantized(hf_name: str) -> bool:
    """Return whether vLLM keeps a tensor in FP8. These are the matrices of the layers' projections, not embedding, head, norms or
    biases."""
    return hf_name.endswith("_proj.weight") and any(part.isdigit() for part in hf_name.split("."))


def scales_name(hf_name: str) -> str:
    """Name of the tensor with the scales of a matrix."""
    return f"{hf_name}_scale_inv"


def scales_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Number of blocks down and across; those at the lower and right edges may be cut off."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def shard_plans(hf_name: str, shape: Sequence[int], pieces: Sequence[Sequence[Piece]]) -> list[PackPlan] | None:
    """Plan how each tensor rank packs its boxes of a matrix; None where a block is spread over several ranks.

    Args:
        pieces: of each rank.
    """
    whole = (shape[0], shape[1])
    try:
        return [plan_pack([_piece(each, whole) for each in rank]) for rank in pieces]
    except NotAligned:
        return None


def _piece(piece: Piece, whole: tuple[int, int]) -> fp8_blocks.Piece:
    return fp8_blocks.Piece(piece.hf_name, whole, piece.hf_box, piece.local_box)


def message_bytes(plan: PackPlan) -> int:
    """Bytes in which a rank's numbers and then its scales travel."""
    return plan.bytes + plan.scales * SCALES.itemsize


def packed(parameter: Tensor, plan: PackPlan, backend: Backend = "auto") -> Tensor:
    """Pack a rank's boxes into a message: numbers, then scales, as uint8 on the parameter's device."""
    message = torch.empty(message_bytes(plan), dtype=torch.uint8, device=parameter.device)
    pack(values(parameter), plan, message, message[plan.bytes :].view(SCALES), backend=backend)
    return message


def unpack(message: Tensor, plan: PackPlan, numbers: Tensor, scales: Tensor) -> None:
    """Put a rank's boxes into their places in the whole tensors.

    Args:
        message: of `packed`.
        numbers: E4M3 [rows, columns], on any device.
        scales: float32, of `scales_shape`.
    """
    of_blocks, into = message[plan.bytes :].view(SCALES), numbers.view(torch.uint8)
    for piece, offset, first in zip(plan.pieces, plan.offsets, plan.scale_offsets, strict=True):
        (top, bottom), (left, right) = piece.box
        into[top:bottom, left:right] = message[offset : offset + piece.rows * piece.columns].view(piece.rows, piece.columns)
        down, across = scales_shape((piece.rows, piece.columns))
        grid = of_blocks[first : first + down * across].view(down, across)
        row, column = top // BLOCK, left // BLOCK
        scales[row : row + down, column : column + across] = grid


def gather_blocks(
    parameter: Tensor,
    plans: Sequence[PackPlan],
    numbers: Tensor,
    scales: Tensor,
    group: dist.ProcessGroup | None,
) -> None:
    """On tensor rank 0: fills both tensors from the boxes of all ranks, one rank's at a time."""
    for rank, plan in enumerate(plans):
        if rank == 0:
            message = packed(parameter, plan)
        elif plan.pieces:
            message = torch.empty(message_bytes(plan), dtype=torch.uint8, device=parameter.device)
            dist.recv(message, group=group, group_src=rank)
        else:
            continue
        unpack(message, plan, numbers, scales)


def send_blocks(parameter: Tensor, plans: Sequence[PackPlan], group: dist.ProcessGroup | None, rank: int) -> None:
    """On the other tensor ranks: this rank's boxes to rank 0."""
    if rank < len(plans) and plans[rank].pieces:
        dist.send(packed(parameter, plans[rank]), group=group, group_dst=0)


def quantize_whole(weight: Tensor, numbers: Tensor, scales: Tensor) -> None:
    """Fills both tensors from a matrix that is whole."""
    plan = _whole(weight.shape[0], weight.shape[1])
    unpack(packed(weight, plan), plan, numbers, scales)


@functools.lru_cache(maxsize=64)
def _whole(rows: int, columns: int) -> PackPlan:
    """Kept from update to update, since a plan has its table on the device: a model's matrices are of a few shapes."""
    extent = Box.whole((rows, columns))
    return plan_pack([fp8_blocks.Piece("", (rows, columns), extent, extent)])
