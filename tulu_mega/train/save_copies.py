"""Copies of what an asynchronous save will write, in main memory: a rank's state as it is at that moment, and little else."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Mapping, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from tulu_mega.train.optimizer_boxes import MAIN

Place = tuple[str, tuple[int, ...]]
"""A tensor of the checkpoint, and where in it a part begins."""
_ALIGNED = 64
"""Bytes at multiples of which copies begin."""
_COMPARED = 2**24
"""Elements that are rounded at a time to compare them: a GPU may have little room left."""


class CopiesPlanner(MCoreSavePlanner):
    """Gives the writer what is to be written; of weights that were not copied, their main parameters rounded once more.

    torch's writer keeps the last tensor of each name until its file is written, so what is made for it alone, from a GPU or out
    of a larger storage, is given up here as soon as it asks for the next: one is in main memory at a time. The writer must ask
    for one after another, as it does with ``per_thread_copy_ahead = 0``.

    Args:
        rounded: from `copy`.
    """

    def __init__(self, rounded: Mapping[Place, Tensor]):
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._rounded = rounded
        self._passing: Tensor | None = None

    def resolve_data(self, write_item: WriteItem):
        """What an item is of; called while files are written, when the item before is on its way to the disk."""
        if self._passing is not None:
            self._passing.untyped_storage().resize_(0)
            self._passing = None
        at = write_item.index
        main = self._rounded.get((at.fqn, tuple(at.offset or ())))
        if main is not None:
            given = main.to(write_item.tensor_data.properties.dtype)
            passing = given.dtype != main.dtype
        else:
            held = super().resolve_data(write_item)
            if not isinstance(held, Tensor):
                return held
            given, passing = held.detach().cpu(), not held.is_cpu
            if given.untyped_storage().size() != given.nbytes:
                given, passing = given.clone(), True
        self._passing = given if passing else None
        return given


def copy(held: Sequence[ShardedTensor]) -> dict[Place, Tensor]:
    """Gives tensors copies of their data.

    A weight is its main parameter rounded; where a rank has all of both, and it is so, the weight has no copy.

    Returns:
        the copy of its main parameter for each weight that has none.
    """
    mains = {(each.key.removeprefix(MAIN), each.global_offset): each for each in held if each.key.startswith(MAIN)}
    rounded: dict[Place, ShardedTensor] = {}
    copied = []
    for each in held:
        place = (each.key, each.global_offset)
        if place in mains and _is_rounded(each.data.detach(), mains[place].data):
            rounded[place] = mains[place]
            each.data = torch.empty(each.data.shape, dtype=each.data.dtype, device="meta")
        else:
            copied.append(each)
    into = _rooms([each.data for each in copied])
    for each, room in zip(copied, into, strict=True):
        each.data = room.copy_(each.data.detach())
    return {place: main.data for place, main in rounded.items()}


def _rooms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors like these, all in one piece of main memory, which goes back to the system with the last of them: the C library
    keeps what many small ones leave. Each has a storage of its own, which the writer takes as it is; it would clone a view."""
    sizes = [each.numel() * each.dtype.itemsize for each in tensors]
    starts = [0, *itertools.accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]
    piece = mmap.mmap(-1, max(starts[-1], 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return [
        torch.frombuffer(piece, dtype=each.dtype, count=each.numel(), offset=start).view(each.shape)
        if each.numel()
        else torch.empty(each.shape, dtype=each.dtype)
        for each, start in zip(tensors, starts, strict=False)
    ]


def _is_rounded(weight: Tensor, main: Tensor) -> bool:
    """Whether a weight is all of a main parameter, rounded to the weight's precision."""
    if type(weight) is not Tensor or weight.numel() != main.numel():  # FP8 weights are another kind, with scales of their own
        return False
    pairs = zip(main.flatten().split(_COMPARED), weight.flatten().split(_COMPARED), strict=True)
    return all(torch.equal(part.to(weight.dtype), of_weight) for part, of_weight in pairs)
