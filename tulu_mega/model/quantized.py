"""Frozen weights that are held as NF4 blocks (QLoRA), each made whole where it is multiplied with and let go again.

A quantized weight passes for a tensor of its shape and type. What an operation takes of it is made from the blocks for that
operation alone, forward and once more backward: autograd keeps the blocks. It is filled as FP8 parameters are (`bridge.fp8`),
and a box of it reads as numbers of its type.

Blocks lie within the rows of a rank's shard. They are those of the whole matrix in Hugging Face's format where a rank's part of
a row is whole blocks, so that a model has the same numbers under every layout. Scales that are quantized once more have
their mean and their groups of 256 from the whole matrix, which the tensor ranks share for it; a rank keeps what its blocks need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import copy_tensor_model_parallel_attributes
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map_only

from tulu_mega.bridge import nf4
from tulu_mega.bridge.adapters import rows_of
from tulu_mega.bridge.nf4 import BLOCK, GROUP
from tulu_mega.bridge.rules import Config, Family, Piece
from tulu_mega.bridge.shards import global_name
from tulu_mega.config import ParallelSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.distributed.topology import Topology
from tulu_mega.errors import UserError
from tulu_mega.layout.blocks import block_problems


@dataclass
class _Scales:
    """The scales of one Hugging Face matrix's blocks that lie in a shard."""

    runs: list[tuple[int, int, int]]
    """(row of the shard, row of the matrix, rows)"""
    first: int
    """block of a row that the shard begins with"""
    across: int
    """blocks of a row of the shard"""
    whole: tuple[int, int]
    """rows and blocks of a row of the matrix"""
    largest: Tensor | None = None
    """of the groups from the first to the last that the shard touches"""
    offset: Tensor | None = None

    @property
    def groups(self) -> tuple[int, int]:
        """The first and the last group of scales that the shard touches."""
        (_, first, _), (_, last, count) = self.runs[0], self.runs[-1]
        ends = first * self.whole[1] + self.first, (last + count - 1) * self.whole[1] + self.first + self.across - 1
        return ends[0] // GROUP, ends[1] // GROUP

    def places(self, device: torch.device, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows of the shard between two, and the place of each of their blocks in the flattened matrix, [rows, across]."""
        cut = [(max(at, start), row + max(0, start - at), min(at + count, stop)) for at, row, count in self.runs]
        held = [(at, row, end - at) for at, row, end in cut if end > at]
        rows = [torch.arange(at, at + count, device=device) for at, _, count in held]
        theirs = [torch.arange(row, row + count, device=device) for _, row, count in held]
        if not rows:
            return torch.empty(0, dtype=torch.long, device=device), torch.empty(0, self.across, dtype=torch.long, device=device)
        blocks = self.first + torch.arange(self.across, device=device)
        return torch.cat(rows), torch.cat(theirs)[:, None] * self.whole[1] + blocks


class BlockWeight(Tensor):
    """A weight as NF4 blocks.

    Args:
        like: parameter whose type and device it has.
        shape: of the shard.
        scales: by matrix; None, scales stay float32.
        group: tensor ranks.
    """

    @staticmethod
    def __new__(cls, like: Tensor, shape: Sequence[int], scales: Sequence[_Scales] | None, group: ProcessGroup):
        return Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=like.dtype, device=like.device)

    def __init__(self, like: Tensor, shape: Sequence[int], scales: Sequence[_Scales] | None, group: ProcessGroup):
        rows, columns = shape
        self.numbers = torch.zeros(rows, columns // 2, dtype=torch.uint8, device=like.device)
        kind = torch.float32 if scales is None else torch.uint8
        self.blocks = torch.zeros(rows, columns // BLOCK, dtype=kind, device=like.device)
        """a scale of each, or the byte that stands for it"""
        self.scales, self.group = scales, group

    @property
    def held(self) -> list[Tensor]:
        """All tensors that it takes memory for."""
        nested = [each for of in self.scales or () for each in (of.largest, of.offset) if each is not None]
        return [self.numbers, self.blocks, *nested]

    @property
    def held_bytes(self) -> int:
        """Bytes of `held`, known before it is filled."""
        nested = (each.groups[1] - each.groups[0] + 2 for each in self.scales or ())
        return self.numbers.nbytes + self.blocks.nbytes + 4 * sum(nested)

    @torch.no_grad()
    def quantize_(self, whole: Tensor) -> None:
        """Takes other numbers. With quantized scales a collective of the tensor ranks."""
        if self.scales is None:
            nf4.quantize(whole, self.numbers, self.blocks)
            return
        made = torch.empty(self.blocks.shape, device=whole.device)
        nf4.quantize(whole, self.numbers, made)
        for each in self.scales:
            rows, places = each.places(made.device, 0, len(made))
            everyones = torch.zeros(each.whole[0] * each.whole[1], device=made.device)
            everyones[places] = made[rows]
            if self.group.size() > 1:  # what others hold is 0 here
                dist.all_reduce(everyones, group=self.group)
            numbers, largest, each.offset = nf4.quantize_scales(everyones)
            self.blocks[rows] = numbers[places]
            low, high = each.groups
            each.largest = largest[low : high + 1].clone()

    @torch.no_grad()
    def whole(self, dtype: torch.dtype | None = None, rows: slice = slice(None)) -> Tensor:
        """The numbers that the blocks stand for, or some rows of them."""
        start, stop, _ = rows.indices(self.shape[0])
        out = torch.empty(stop - start, self.shape[1], dtype=dtype or self.dtype, device=self.device)
        if self.device.type != "meta":
            nf4.dequantize(self.numbers[start:stop], self._scales(start, stop), out)
        return out

    def _scales(self, start: int, stop: int) -> Tensor:
        if self.scales is None:
            return self.blocks[start:stop]
        made = torch.empty(stop - start, self.blocks.shape[1], device=self.blocks.device)
        for each in self.scales:
            rows, places = each.places(made.device, start, stop)
            if len(rows):
                own = each.largest[places // GROUP - each.groups[0]]
                made[rows - start] = nf4.dequantize_scales(self.blocks[rows], own, each.offset)
        return made

    def __getitem__(self, box: tuple[slice, ...]) -> Tensor:
        rows, *columns = box if isinstance(box, tuple) else (box,)
        return self.whole(rows=rows)[(slice(None), *columns)]

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are no weights of blocks

    def __repr__(self) -> str:
        return f"BlockWeight({list(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten.detach.default:  # as autograd keeps it, and nn.Parameter takes it
            same = Tensor._make_wrapper_subclass(cls, args[0].shape, dtype=args[0].dtype, device=args[0].device)
            same.__dict__.update(args[0].__dict__)
            return same
        if func.overloadpacket.__name__.endswith("_") and args and isinstance(args[0], cls):
            raise RuntimeError(f"{func}: a quantized weight is not written in place; quantize_() takes other numbers")
        args, kwargs = tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def quantize_layers(chunks: Sequence[nn.Module], lora: LoraSettings, family: Family, config: Config, here: Topology) -> None:
    """Gives the linear layers of a rank's chunks weights of blocks, all zero: they are to be loaded next.

    Args:
        chunks: of layers `without_weight`.
        family, config: the model's.

    Raises:
        UserError: parts of rows that are not whole blocks.
    """
    if problems := block_problems(config, lora, ParallelSettings(tensor=here.tensor)):
        raise UserError(problems)
    for chunk in chunks:
        for name, old in list(chunk.named_parameters()):
            whole, place = global_name(chunk, name), name.removesuffix(".weight")
            if not name.endswith(".weight") or not any(map(LoraSettings().has, rows_of(family, whole, config, here))):
                continue
            pieces = family.pieces(whole, config, here)
            scales = _scales_of(pieces, family.hf_shapes(config)) if lora.double_quantization else None
            made = BlockWeight(old, family.local_shape(whole, config, here), scales, here.tensor_group)
            weight = nn.Parameter(made, requires_grad=False)
            copy_tensor_model_parallel_attributes(weight, old)
            chunk.get_submodule(place).weight = weight


def _scales_of(pieces: Sequence[Piece], shapes: dict[str, tuple[int, ...]]) -> list[_Scales]:
    found: dict[str, _Scales] = {}
    for piece in pieces:
        (row, last), (left, right) = piece.hf_box
        rows, columns = shapes[piece.hf_name]
        made = _Scales([], left // BLOCK, (right - left) // BLOCK, (rows, columns // BLOCK))
        found.setdefault(piece.hf_name, made).runs.append((piece.local_box[0][0], row, last - row))
    return list(found.values())
