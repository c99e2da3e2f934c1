"""The shards of a running model as boxes of Hugging Face tensors, and the gathering of these boxes on a tensor rank.

A chunk is one virtual pipeline stage's unwrapped GPTModel: of it this file uses ``named_parameters()`` and
``decoder.layers[k].layer_number`` (from 1, in the whole model) and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tulu_mega.bridge.adapters import ROOT
from tulu_mega.bridge.box import Box
from tulu_mega.bridge.files.hf_files import TensorInfo
from tulu_mega.bridge.files.hf_writer import tensor_info
from tulu_mega.bridge.rules import Config, Family, Piece, is_weight
from tulu_mega.distributed.grid import ShardGrid

_SLAB_BYTES = 32 * 2**20
_LAYERS = "decoder.layers."


class Values(Protocol):
    """A tensor, or what can be read like one, a box at a time."""

    device: torch.device
    dtype: torch.dtype
    itemsize: int

    def __getitem__(self, box: tuple[slice, ...]) -> Tensor: ...


@dataclass(frozen=True)
class ModelShard:
    """The part of a model that a rank holds."""

    chunks: Sequence[nn.Module]
    """the rank's model chunks, unwrapped; they may lie on the meta device"""
    config: Config
    """the model's config.json"""
    family: Family
    grid: ShardGrid
    """the rank's place"""
    tensor_group: dist.ProcessGroup | None = None
    """process group of the tensor ranks; None for a size of 1"""
    pipeline_group: dist.ProcessGroup | None = None
    """as `tensor_group`"""
    merged: Callable[[Tensor], Values] = lambda parameter: parameter
    """What goes out for a parameter: its values with those of its adapters, where it has any."""


def exportable(chunk: nn.Module, adapters: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every tensor of a chunk that has a Hugging Face name, under its name in the whole model.

    Loading, export, the stream to servers, checkpoints' weights and the dry run take what they move from here.

    Args:
        adapters: what trains beside frozen weights is meant, low-rank adapters and a reward model's head, instead of the model.
    """
    for name, parameter in chunk.named_parameters():
        if is_weight(name) and (parameter.requires_grad if adapters else not name.startswith(ROOT)):
            yield global_name(chunk, name), parameter


def global_name(chunk: nn.Module, name: str) -> str:
    """Return the name in the whole model of a chunk's tensor: the layer's local number becomes its global one."""
    if not name.startswith(_LAYERS):
        return name
    local, rest = name[len(_LAYERS) :].split(".", 1)
    return f"{_LAYERS}{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"


@dataclass(frozen=True)
class Outbound:
    """A Hugging Face tensor to be sent or written, with the boxes that each tensor rank holds."""

    hf_name: str
    parameter: Values
    pieces: tuple[tuple[Piece, ...], ...]
    """per TP rank; of a replicated tensor only rank 0's"""


def outbound(shard: ModelShard) -> list[Outbound]:
    """Return the tensors of the rank's chunks, in the same order on every rank of the tensor group. Not a collective."""
    items = []
    for chunk in shard.chunks:
        for name, parameter in exportable(chunk, shard.family.adapters):
            per_rank = shard.family.pieces_by_rank(name, shard.config, shard.grid)
            if any(piece.duplicate for pieces in per_rank for piece in pieces):
                continue
            for hf_name in dict.fromkeys(piece.hf_name for pieces in per_rank for piece in pieces):
                chosen = tuple(tuple(piece for piece in pieces if piece.hf_name == hf_name) for pieces in per_rank)
                items.append(Outbound(hf_name, shard.merged(parameter), chosen))
    return items


def announced(items: Sequence[Outbound], shard: ModelShard, dtype: torch.dtype) -> list[dict[str, TensorInfo]]:
    """Gather the names of the tensors that each pipeline rank will give. A collective of the pipeline group.

    Args:
        items: `outbound` of the shard.
        dtype: of what is given.

    Raises:
        RuntimeError: a tensor of the model is missing, or is there twice.
    """
    shapes = shard.family.hf_shapes(shard.config)
    mine = {item.hf_name: tensor_info(shapes[item.hf_name], dtype) for item in items}
    ranks: list[dict[str, TensorInfo]] = [mine]
    if shard.grid.pipeline > 1:
        ranks = [{} for _ in range(shard.grid.pipeline)]
        dist.all_gather_object(ranks, mine, group=shard.pipeline_group)
    _check_complete(ranks, shapes)
    return ranks


def _check_complete(ranks: Sequence[Mapping[str, TensorInfo]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    held = Counter(name for each in ranks for name in each)
    missing = sorted(shapes.keys() - held.keys())
    twice = sorted(name for name, count in held.items() if count > 1)
    if missing or twice:
        raise RuntimeError(f"the pipeline stages do not make up the model: missing {missing}, held twice {twice}")


def copy_in_slabs(target: Tensor, source: Tensor) -> None:
    """Copy a tensor into another. Temporaries (another device, another type) stay small for tensors of any size.

    Where type and device are the same, NumPy copies with memcpy, which bypasses the cache for large copies.
    """
    if _same_bytes(target, source):
        np.copyto(_bytes(target), _bytes(source))
        return
    rows = max(1, _SLAB_BYTES // max(1, source[0].nbytes)) if len(source) else 1
    for at in range(0, len(source), rows):
        target[at : at + rows].copy_(source[at : at + rows])


def _same_bytes(target: Tensor, source: Tensor) -> bool:
    """Return whether copying one block of memory copies the tensor."""
    on_cpu = target.device.type == source.device.type == "cpu"
    same = target.dtype == source.dtype and target.shape == source.shape
    return on_cpu and same and target.is_contiguous() and source.is_contiguous()


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


Copies = Callable[[int, Sequence[Tensor], Sequence[Tensor]], None]
"""Copies boxes, which a tensor rank holds, to boxes."""


def copy_each(_rank: int, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        copy_in_slabs(target, source)


def gather(items: Sequence[Outbound], wholes: Sequence[Tensor], shard: ModelShard, copies: Copies = copy_each) -> None:
    """Fill whole tensors, on any device, from the boxes of all ranks, one rank after the other. TP rank 0 calls it."""
    for rank in range(max(len(item.pieces) for item in items)):
        held = _held(items, rank)
        targets = [wholes[at][piece.hf_box.slices] for at, piece in held]
        if rank == 0:
            copies(rank, [items[at].parameter[piece.local_box.slices] for at, piece in held], targets)
        elif held:
            received = torch.empty(_size(held), dtype=wholes[0].dtype, device=items[0].parameter.device)
            dist.recv(received, group=shard.tensor_group, group_src=rank)
            copies(rank, _side_by_side(received, held), targets)


def send(items: Sequence[Outbound], dtype: torch.dtype, shard: ModelShard, copies: Copies = copy_each) -> None:
    """Send this rank's boxes to rank 0, in one message. The other TP ranks call it."""
    rank = shard.grid.tensor_rank
    if held := _held(items, rank):
        message = torch.empty(_size(held), dtype=dtype, device=items[0].parameter.device)
        own = [items[at].parameter[piece.local_box.slices] for at, piece in held]
        copies(rank, own, _side_by_side(message, held))
        dist.send(message, group=shard.tensor_group, group_dst=0)


def _held(items: Sequence[Outbound], rank: int) -> list[tuple[int, Piece]]:
    """Return the pieces of some tensors that a TP rank holds, each with its tensor's place among them."""
    return [(at, piece) for at, item in enumerate(items) if rank < len(item.pieces) for piece in item.pieces[rank]]


def _size(held: Sequence[tuple[int, Piece]]) -> int:
    return sum(piece.hf_box.volume for _, piece in held)


def _side_by_side(message: Tensor, held: Sequence[tuple[int, Piece]]) -> list[Tensor]:
    """The boxes in a message."""
    boxes: list[Box] = [piece.hf_box for _, piece in held]
    parts = message.split([box.volume for box in boxes])
    return [part.view(box.shape) for part, box in zip(parts, boxes, strict=True)]
