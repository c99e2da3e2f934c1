"""Boxes of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Self


class Box(tuple[tuple[int, int], ...]):
    """A box of a tensor: (start, stop) along each axis. A plain tuple of the same numbers is equal to it.

    >>> weight[Box([(0, 4), (2, 6)]).slices]
    """

    __slots__ = ()

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Self:
        """All of a tensor."""
        return cls((0, extent) for extent in shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent along each axis."""
        return tuple(stop - start for start, stop in self)

    @property
    def volume(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index that takes the box out of its tensor."""
        return tuple(slice(start, stop) for start, stop in self)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{start}:{stop}" for start, stop in self) + "]"
