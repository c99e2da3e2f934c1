"""The state of a sharded optimizer as boxes of the checkpoint's tensors.

megatron-core's `fully_reshardable` form has a tensor of a parameter's own shape for the main parameter and for each moment. To
write it, megatron-core gathers the state of a data-parallel group on its first rank, with 32 bytes a parameter at the peak; to
read it, every rank makes room for all of it. But what a rank holds of a parameter is a run of its elements, row by row, and such
a run is a few boxes. Each rank writes and reads these, at their places in the same tensors: nothing is gathered, copied or sent,
and any layout reads what any other has written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from tulu_mega.train.rounded_adam import Box

FORM = "fully_reshardable"
"""megatron-core's name of the form."""
_STATE = "optimizer.state."
MAIN = f"{_STATE}param."
"""What megatron-core's name of a main parameter in a checkpoint has before that of its weight."""


def boxes_of(optimizer: DistributedOptimizer, model: dict[str, Any]) -> dict[str, ShardedTensor]:
    """Main parameters and moments that this rank holds; their data are the optimizer's own.

    Args:
        model: parameters as megatron-core describes them for a checkpoint, all ranks' alike.
    """
    described = _described(model)
    boxes: list[ShardedTensor] = []
    for parameter, start, stop in _held(optimizer):
        group, place = optimizer.model_param_group_index_map[parameter]
        main = optimizer.optimizer.param_groups[group]["params"][place]
        held = {"param": main, **optimizer.optimizer.state[main]}
        held["param"] = held.pop("master_param", main)  # a precision-aware optimizer's own
        for name, value in held.items():
            if name != "step" and isinstance(value, Tensor) and value.numel() == stop - start:
                whole = _whole(described[parameter], parameter, f"{_STATE}{name}.", value.dtype)
                boxes += _boxes(whole, value.detach().flatten(), start)
    return {str(at): box for at, box in enumerate(boxes)}


def places_of(optimizer: DistributedOptimizer, model: dict[str, Any]) -> dict[Tensor, list[Box]]:
    """Where in the whole model's tensors the elements lie that this rank updates, of each main parameter.

    Args:
        model: as for `boxes_of`.
    """
    described = _described(model)
    places: dict[Tensor, list[Box]] = {}
    for parameter, start, stop in _held(optimizer):
        group, place = optimizer.model_param_group_index_map[parameter]
        blank = torch.empty(stop - start, device="meta")
        boxes = _boxes(_whole(described[parameter], parameter, "", blank.dtype), blank, start)
        places[optimizer.optimizer.param_groups[group]["params"][place]] = [
            Box(box.key, tuple(box.global_shape), tuple(box.global_offset), tuple(box.data.shape)) for box in boxes
        ]
    return places


def _described(model: dict[str, Any]) -> dict[Tensor, ShardedTensor | ShardedTensorFactory]:
    kinds = (ShardedTensor, ShardedTensorFactory)
    return {held.data: held for held in nested_values(model) if isinstance(held, kinds)}


def _held(optimizer: DistributedOptimizer) -> Iterator[tuple[Tensor, int, int]]:
    """The parameters of which this rank updates elements, and which these are."""
    for by_dtype in optimizer.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _whole(
    held: ShardedTensor | ShardedTensorFactory, parameter: Tensor, prefix: str, dtype: torch.dtype
) -> list[tuple[ShardedTensor, int]]:
    """The checkpoint's tensors that a parameter's values of one kind go to, without data, and where in the parameter each begins.

    They are those of the parameter itself: several where megatron-core keeps parts of it apart, as of gate and up projection.
    """
    blank = torch.empty(parameter.shape, dtype=dtype, device="meta")
    if isinstance(held, ShardedTensor):
        return [(replace(held, key=prefix + held.key, data=blank, dtype=dtype), 0)]
    parts = nested_values(replace(held, key=prefix + held.key, data=blank).build())
    found = sorted(((part, part.data.storage_offset()) for part in parts), key=lambda each: each[1])
    after = 0
    for part, start in found:
        if start != after or not part.data.is_contiguous():
            raise ValueError(f"{held.key}: its parts in a checkpoint do not follow one another")
        after += part.data.numel()
    if after != parameter.numel():
        raise ValueError(f"{held.key}: its parts in a checkpoint are {after} of its {parameter.numel()} elements")
    return found


def _boxes(whole: Sequence[tuple[ShardedTensor, int]], values: Tensor, start: int) -> Iterator[ShardedTensor]:
    """A run of a parameter's elements, which begins at `start`, as boxes of the tensors it lies in."""
    for part, begins in whole:
        first, last = max(start, begins), min(start + len(values), begins + part.data.numel())
        if first >= last:
            continue
        at = first
        for offsets, sizes in runs(part.local_shape, first - begins, last - begins):
            count = math.prod(sizes)
            ahead = (1,) * part.prepend_axis_num
            place = [corner + offset for corner, offset in zip(part.global_offset, (0,) * len(ahead) + offsets, strict=True)]
            yield replace(
                part,
                data=values[at - start : at - start + count].view(ahead + sizes),
                local_shape=ahead + sizes,
                global_offset=tuple(place),
                axis_fragmentations=None,  # boxes make no grid
                prepend_axis_num=0,
                replica_id=(*part.replica_id[:-1], 0),  # other data-parallel ranks hold other elements
            )
            at += count


def runs(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements `start` to `stop` of a tensor, counted in rows, as boxes in the same order.

    Returns:
        of each box, where it begins and its sizes.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # within one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, sizes in runs(shape[1:], start, stop):
        yield (row, *offsets), (1, *sizes)
