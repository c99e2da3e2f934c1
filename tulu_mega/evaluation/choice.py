"""Which problems are asked where `limit` asks for fewer than there are."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

_SEED = 0
"""Never another one: checkpoints are compared by the same problems, whatever their responses are drawn with."""


def even(groups: Sequence[str], limit: int | None) -> list[int]:
    """Places of the problems to ask, ascending: of every group as many as of the others, drawn within it by a fixed seed.

    Files of benchmarks are sorted by task, subject or kind, so their first rows are no sample of them. Groups take turns until
    there are enough, those with few problems until these are used up; where there are more groups than problems wanted, they are
    drawn too. The choice depends on nothing but the groups and the limit, and a larger limit adds to the choice of a smaller one.

    Args:
        groups: each problem's group, such as its subject.
        limit: problems at most; all when None.

    >>> even(["a"] * 6 + ["b"] * 2, 4)
    [1, 4, 6, 7]
    """
    if limit is None or limit >= len(groups):
        return list(range(len(groups)))
    members: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    names = sorted(members)
    turns = [_shuffled(members[names[at]], names[at]) for at in _shuffled(range(len(names)), "")]
    drawn = [place for turn in zip_longest(*turns) for place in turn if place is not None]
    return sorted(drawn[:limit])


def _shuffled(places: Sequence[int], name: str) -> list[int]:
    # RandomState, whose streams NumPy keeps for good; a name of its own lets no group draw the rows that another one draws
    order = np.random.RandomState(_SEED ^ zlib.crc32(name.encode(errors="replace"))).permutation(len(places))
    return [places[at] for at in order]
