"""The shards of a running model as boxes of Hugging Face tensors, and how these come together on a tensor rank.

A chunk is one virtual pipeline stage's unwrapped GPTModel: of it this file uses ``named_parameters()`` and
``decoder.layers[k].layer_number`` (from 1, in the whole model) and nothing else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tulu_mega.bridge.files.hf_files import TensorInfo
from tulu_mega.bridge.files.hf_writer import tensor_info
from tulu_mega.bridge.rules import Config, Family, Piece, Region, is_weight

_SLAB_BYTES = 32 * 2**20


def global_parameters(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The chunk's weights under the names they have in the whole model: local layer numbers become global ones."""
    prefix = "decoder.layers."
    for name, parameter in chunk.named_parameters():
        if name.startswith(prefix):
            local, rest = name[len(prefix) :].split(".", 1)
            name = f"{prefix}{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"
        if is_weight(name):
            yield name, parameter


@dataclass(frozen=True)
class Outbound:
    """A Hugging Face tensor on its way out: who holds which boxes of it."""

    hf_name: str
    parameter: Tensor
    pieces: tuple[tuple[Piece, ...], ...]
    """per TP rank; of a replicated tensor only rank 0's"""


def outbound(chunks: Sequence[nn.Module], family: Family, config: Config, tp_size: int) -> list[Outbound]:
    """This stage's tensors in one order on every TP rank."""
    items = []
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            per_rank = [family.pieces(name, rank, tp_size, config) for rank in range(tp_size)]
            if any(piece.duplicate for pieces in per_rank for piece in pieces):
                continue
            if per_rank == [per_rank[0]] * tp_size:  # replicated
                per_rank = per_rank[:1]
            for hf_name in dict.fromkeys(piece.hf_name for pieces in per_rank for piece in pieces):
                chosen = tuple(tuple(piece for piece in pieces if piece.hf_name == hf_name) for pieces in per_rank)
                items.append(Outbound(hf_name, parameter, chosen))
    return items


def announced(items: Sequence[Outbound], family: Family, config: Config, dtype: torch.dtype) -> dict[str, TensorInfo]:
    shapes = family.hf_shapes(config)
    return {item.hf_name: tensor_info(shapes[item.hf_name], dtype) for item in items}


def check_complete(stages: Sequence[Mapping[str, TensorInfo]], family: Family, config: Config) -> None:
    held = Counter(name for stage in stages for name in stage)
    missing = sorted(family.hf_shapes(config).keys() - held.keys())
    twice = sorted(name for name, count in held.items() if count > 1)
    if missing or twice:
        raise RuntimeError(f"the pipeline stages do not make up the model: missing {missing}, held twice {twice}")


def box(tensor: Tensor, region: Region) -> Tensor:
    return tensor[tuple(slice(start, stop) for start, stop in region)]


def copy_in_slabs(target: Tensor, source: Tensor) -> None:
    """A copy whose temporaries (another device, another type) stay small whatever the size of the tensor.

    Where there are none it is the C library's, which knows better than torch what not to keep in the cache.
    """
    if _same_bytes(target, source):
        np.copyto(_bytes(target), _bytes(source))
        return
    rows = max(1, _SLAB_BYTES // max(1, source[0].nbytes)) if len(source) else 1
    for at in range(0, len(source), rows):
        target[at : at + rows].copy_(source[at : at + rows])


def _same_bytes(target: Tensor, source: Tensor) -> bool:
    """Whether a copy of one block of memory makes one the other."""
    on_cpu = target.device.type == source.device.type == "cpu"
    same = target.dtype == source.dtype and target.shape == source.shape
    return on_cpu and same and target.is_contiguous() and source.is_contiguous()


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def volume(region: Region) -> int:
    return math.prod(stop - start for start, stop in region)


Copies = Callable[[int, Sequence[Tensor], Sequence[Tensor]], None]
"""Copies boxes, which a tensor rank holds, to boxes."""


def copy_each(_rank: int, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        copy_in_slabs(target, source)


def gather(
    items: Sequence[Outbound], wholes: Sequence[Tensor], tp_group: dist.ProcessGroup | None, copies: Copies = copy_each
) -> None:
    """On TP rank 0: fills whole tensors, on whichever device they are, from the boxes of all ranks, one rank's at a time."""
    for rank in range(max(len(item.pieces) for item in items)):
        boxes = _boxes(items, rank)
        targets = [box(wholes[at], piece.hf_region) for at, piece in boxes]
        if rank == 0:
            copies(rank, [box(items[at].parameter, piece.local_region) for at, piece in boxes], targets)
        elif boxes:
            received = torch.empty(_size(boxes), dtype=wholes[0].dtype, device=items[0].parameter.device)
            dist.recv(received, group=tp_group, group_src=rank)
            copies(rank, _side_by_side(received, boxes), targets)


def send(
    items: Sequence[Outbound], dtype: torch.dtype, tp_group: dist.ProcessGroup | None, tp_rank: int, copies: Copies = copy_each
) -> None:
    """On the other TP ranks: this rank's boxes to rank 0, in one message."""
    if boxes := _boxes(items, tp_rank):
        message = torch.empty(_size(boxes), dtype=dtype, device=items[0].parameter.device)
        own = [box(items[at].parameter, piece.local_region) for at, piece in boxes]
        copies(tp_rank, own, _side_by_side(message, boxes))
        dist.send(message, group=tp_group, group_dst=0)


def _boxes(items: Sequence[Outbound], rank: int) -> list[tuple[int, Piece]]:
    """What a TP rank holds of some tensors: the tensor's place among them, and the box."""
    return [(at, piece) for at, item in enumerate(items) if rank < len(item.pieces) for piece in item.pieces[rank]]


def _size(boxes: Sequence[tuple[int, Piece]]) -> int:
    return sum(volume(piece.hf_region) for _, piece in boxes)


def _side_by_side(message: Tensor, boxes: Sequence[tuple[int, Piece]]) -> list[Tensor]:
    """The boxes in a message."""
    regions = [piece.hf_region for _, piece in boxes]
    parts = message.split([volume(region) for region in regions])
    return [part.view([stop - start for start, stop in region]) for part, region in zip(parts, regions, strict=True)]
