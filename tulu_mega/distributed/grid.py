"""Which rank of the trainer holds which part of the model, as data: no process group is needed to know it.

A parameter is cut along the tensor axis (by its rule), layers are shared out along the pipeline axis and its virtual stages, and
the ranks along the other axes hold copies. Parameters that are shared out otherwise (experts) would have axes and copies of their
own: a second pair of the two tuples below.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod
from typing import Self

AXES = ("tensor", "context", "data", "pipeline")
"""The axes of the world in the order in which megatron-core numbers its ranks: neighbours differ along the first."""
COPIES = ("context", "data")
"""Axes along which ranks hold the same weights."""


@dataclass(frozen=True)
class ShardGrid:
    """The size of the world along every axis, and the place of one of its ranks."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    """model chunks, which are virtual stages, on each pipeline rank"""
    context: int = 1
    data: int = 1
    rank: int = 0
    """number of the rank in the world"""

    @property
    def world(self) -> int:
        """Number of ranks."""
        return prod(getattr(self, axis) for axis in AXES)

    @property
    def sizes(self) -> dict[str, int]:
        """The layout, in the order TP, PP, VPP, CP, DP."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "rank"}

    @property
    def tensor_rank(self) -> int:
        return self._place("tensor")

    @property
    def pipeline_rank(self) -> int:
        return self._place("pipeline")

    @property
    def context_rank(self) -> int:
        return self._place("context")

    @property
    def data_rank(self) -> int:
        return self._place("data")

    @property
    def stages(self) -> range:
        """The virtual stages of the rank, one a chunk; the model's layers lie on them in the stages' order."""
        return range(self.pipeline_rank, self.pipeline * self.virtual, self.pipeline)

    @property
    def copies(self) -> int:
        """Number of ranks that hold the same weights."""
        return prod(getattr(self, axis) for axis in COPIES)

    @property
    def copy(self) -> int:
        """Number of this rank among those that hold the same weights."""
        number, stride = 0, 1
        for axis in COPIES:
            number += stride * self._place(axis)
            stride *= getattr(self, axis)
        return number

    @property
    def first_copy(self) -> bool:
        """Whether this rank gives its weights away: of the ranks that hold the same weights only the first writes or sends."""
        return self.copy == 0

    @property
    def gives_whole_tensors(self) -> bool:
        """Whether this rank gathers its pipeline rank's tensors and hands them to files or servers: the first tensor rank of the
        first copy."""
        return self.first_copy and self.tensor_rank == 0

    def at(self, *, tensor_rank: int | None = None, pipeline_rank: int | None = None, copy: int | None = None) -> Self:
        """The grid seen from another rank, which differs from this one in the places that are given."""
        places = {axis: self._place(axis) for axis in AXES}
        if tensor_rank is not None:
            places["tensor"] = tensor_rank
        if pipeline_rank is not None:
            places["pipeline"] = pipeline_rank
        if copy is not None:
            for axis in COPIES:
                copy, places[axis] = divmod(copy, getattr(self, axis))
        number, stride = 0, 1
        for axis in AXES:
            number += stride * places[axis]
            stride *= getattr(self, axis)
        return replace(self, rank=number)

    def tensor_peers(self) -> list[Self]:
        """The grid seen from each rank of this rank's tensor parallel group."""
        return [self.at(tensor_rank=rank) for rank in range(self.tensor)]

    def _place(self, axis: str) -> int:
        """Coordinate of the rank along an axis."""
        stride = prod(getattr(self, each) for each in AXES[: AXES.index(axis)])
        return self.rank // stride % getattr(self, axis)
