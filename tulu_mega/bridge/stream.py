"""A running model as a stream of whole Hugging Face tensors, for rollout engines."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from tulu_kernels.buckets import BoxCopies
from tulu_kernels.dispatch import Backend

from tulu_mega.bridge.fp8 import (
    NUMBERS,
    SCALES,
    gather_blocks,
    is_quantized,
    message_bytes,
    quantize_whole,
    scales_name,
    scales_shape,
    send_blocks,
    shard_plans,
)
from tulu_mega.bridge.rules import Family
from tulu_mega.bridge.shards import Copies, ModelShard, Outbound, announced, copy_each, gather, outbound, send


@dataclass(frozen=True)
class WeightMeta:
    """Name, type and shape of a tensor to be sent, in the structure of vLLM's ``ParamMeta``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Outgoing:
    """A whole tensor that a pipeline stage would send."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sent: tuple[int, ...]
    """bytes that each tensor rank has of it to give, of a replicated tensor the first alone; scales go with their matrix"""


def outgoing(shard: ModelShard, dtype: torch.dtype, fp8: bool = False) -> dict[str, Outgoing]:
    """Return the tensors that `LiveWeights` of this shard yields, in order. No collective: the chunks may be on the meta device.

    Args:
        dtype, fp8: as of `LiveWeights`.
    """
    shapes = shard.family.hf_shapes(shard.config)
    items = sorted(outbound(shard), key=lambda item: _layer(item.hf_name, shard.family))
    found = {}
    for item in items:
        name, shape = item.hf_name, shapes[item.hf_name]
        volumes = [sum(piece.hf_box.volume for piece in pieces) for pieces in item.pieces]
        if fp8 and is_quantized(name):
            plans = shard_plans(name, shape, item.pieces)
            itemsize = item.parameter.itemsize
            sent = map(message_bytes, plans) if plans else (volume * itemsize for volume in volumes)
            found[name] = Outgoing(NUMBERS, shape, tuple(sent))
            found[scales_name(name)] = Outgoing(SCALES, scales_shape(shape), (0,))
        else:
            found[name] = Outgoing(dtype, shape, tuple(volume * dtype.itemsize for volume in volumes))
    return found


class LiveWeights:
    """A running model as a stream of whole Hugging Face tensors, stage by stage at once: vLLM's ``WeightSource`` in structure.

    Every rank of the first copy (`ShardGrid.first_copy`) has one, and all of a tensor parallel group walk through it together:
    rank 0 gathers, the others send. Importing vLLM's own base class would cost every trainer rank seconds and some 270 MB.

    Building it is a collective of the pipeline group.

    Args:
        shard: this rank's part of the model, with its groups; its parameters are read anew in each pass.
        dtype: of the stream, bfloat16 or float32, whatever the model's.
        fp8: whether matrices of the layers travel as FP8 blocks, each as two tensors, the scales right behind the numbers
            (`bridge.fp8`); made of the model's weights as they are.
        kernels: what fills tensors together, see `tulu_kernels.dispatch`.
    """

    def __init__(self, shard: ModelShard, dtype: torch.dtype, *, fp8: bool = False, kernels: Backend = "auto"):
        self._shard, self._dtype = shard, dtype
        self._receives = shard.grid.tensor_rank == 0
        self._items = outbound(shard)
        stages = announced(self._items, shard, dtype)
        shapes = {name: info.shape for tensors in stages for name, info in tensors.items()}
        order = sorted(shapes, key=lambda name: _layer(name, shard.family))
        place = {name: at for at, name in enumerate(order)}
        self._items.sort(key=lambda item: place[item.hf_name])
        self._metadata: dict[str, WeightMeta] = {}
        self.stage_of: dict[str, int] = {}
        """pipeline stage that sends each tensor"""
        stage_of = {name: stage for stage, tensors in enumerate(stages) for name in tensors}
        self._tensors = {name: _tensors(name, shapes[name], dtype, fp8) for name in order}
        """of each of the model's tensors, those that travel"""
        for name, tensors in self._tensors.items():
            for meta in tensors:
                self._metadata[meta.name], self.stage_of[meta.name] = meta, stage_of[name]
        self._packing = {
            item.hf_name: shard_plans(item.hf_name, shapes[item.hf_name], item.pieces)
            for item in self._items
            if len(self._tensors[item.hf_name]) > 1
        }
        """of matrices that are quantized: by tensor rank how it packs its boxes; None for those that are gathered first"""
        self._scales: dict[str, Tensor | None] = {}
        """of matrices that were quantized, until they are asked for"""
        self._kernels = kernels
        self._planned: dict[tuple[str, ...], dict[int, BoxCopies]] = {}
        """of tensors that are filled together, by rank that holds the boxes"""

    def metadata(self) -> list[WeightMeta]:
        """Return every tensor of the whole model, the same on all ranks: embedding, layers in order, the rest."""
        return list(self._metadata.values())

    def held_names(self) -> list[str]:
        """Return the names of the tensors that this stage yields, in order."""
        return [meta.name for item in self._items for meta in self._tensors[item.hf_name]]

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yield names and whole tensors, in new memory on the CPU. TP ranks other than the first yield None for each tensor."""
        for name in self.held_names():
            meta = self._metadata[name]
            whole = torch.empty(meta.shape, dtype=meta.dtype) if self._receives else None
            self.fill(name, whole)
            yield name, whole

    def fill(self, name: str, whole: Tensor | None) -> None:
        """Write one of this stage's tensors into given memory. All TP ranks call it, for one tensor after the other; scales come
        after their matrix.

        Args:
            whole: on TP rank 0, of the tensor's shape and type (`metadata`), on any device.
        """
        if name in self._by_name:
            item = self._by_name[name]
            if name in self._packing:
                self._pass_blocks(item, whole)
            else:
                self._pass([item], [whole])
            return
        scales = self._scales.pop(name)
        if scales is not None:
            whole.copy_(scales)

    def fill_together(self, names: Sequence[str], wholes: Sequence[Tensor | None]) -> None:
        """Does as `fill` for tensors that lie on the parameters' device, with one message a rank and, on a GPU, a few launches.

        What travels as FP8 blocks goes one after the other.

        Args:
            names: some of `held_names`. The same ones are copied as was planned the first time, as long as nothing moved.
        """
        pairs = list(zip(names, wholes, strict=True))
        plain = [pair for pair in pairs if pair[0] in self._by_name and pair[0] not in self._packing]
        if plain:
            planned = self._planned.setdefault(tuple(name for name, _ in plain), defaultdict(partial(BoxCopies, self._kernels)))
            items, whole = [self._by_name[name] for name, _ in plain], [whole for _, whole in plain]
            self._pass(items, whole, lambda rank, sources, targets: planned[rank](sources, targets))
        for name, whole in pairs:
            if name in self._packing or name not in self._by_name:
                self.fill(name, whole)

    @cached_property
    def _by_name(self) -> dict[str, Outbound]:
        return {item.hf_name: item for item in self._items}

    @torch.no_grad()
    def _pass(self, items: Sequence[Outbound], wholes: Sequence[Tensor | None], copies: Copies = copy_each) -> None:
        if self._receives:
            gather(items, wholes, self._shard, copies)
        else:
            send(items, self._dtype, self._shard, copies)

    @torch.no_grad()
    def _pass_blocks(self, item: Outbound, numbers: Tensor | None) -> None:
        """Write a matrix's numbers, and keep its scales for the next call."""
        of_numbers, of_scales = self._tensors[item.hf_name]
        plans, scales = self._packing[item.hf_name], None
        group = self._shard.tensor_group
        if not self._receives:
            if plans:
                send_blocks(item.parameter, plans, group, self._shard.grid.tensor_rank)
            else:
                send([item], item.parameter.dtype, self._shard)
        else:
            scales = torch.empty(of_scales.shape, dtype=of_scales.dtype, device=item.parameter.device)
            if plans:
                gather_blocks(item.parameter, plans, numbers, scales, group)
            else:
                whole = torch.empty(of_numbers.shape, dtype=item.parameter.dtype, device=item.parameter.device)
                gather([item], [whole], self._shard)
                quantize_whole(whole, numbers, scales)
        self._scales[of_scales.name] = scales


def _tensors(name: str, shape: tuple[int, ...], dtype: torch.dtype, fp8: bool) -> list[WeightMeta]:
    """The tensors as which one of the model's travels."""
    if not (fp8 and is_quantized(name)):
        return [WeightMeta(name, dtype, shape)]
    scales = WeightMeta(scales_name(name), SCALES, scales_shape(shape))
    return [WeightMeta(name, NUMBERS, shape), scales]


def _layer(hf_name: str, family: Family) -> float:
    """Return a tensor's place in the stream: its layer's number; the embedding comes first, every other tensor last."""
    number = next((part for part in hf_name.split(".") if part.isdigit()), None)
    if number is not None:
        return int(number)
    return -1 if hf_name == family.embedding else math.inf
