"""A check that boxes cover a tensor exactly once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tulu_mega.bridge.box import Box


def uncovered(whole: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """None when the boxes cover a tensor exactly once; else what is wrong, with the first place where it is.

    Axes are cut at all the boxes' edges, so that each cell lies in a box or outside of it as a whole.

    Args:
        whole: the tensor's shape.
    """
    for box in boxes:
        if len(box) != len(whole) or any(not 0 <= a <= b <= size for (a, b), size in zip(box, whole, strict=False)):
            return f"the box {box} does not lie in the shape {list(whole)}"
    cuts = [sorted({0, size} | {edge for box in boxes for edge in box[axis]}) for axis, size in enumerate(whole)]
    at = [{edge: place for place, edge in enumerate(edges)} for edges in cuts]
    times = np.zeros([max(len(edges) - 1, 0) for edges in cuts], dtype=np.int32)
    for box in boxes:
        times[Box((at[axis][start], at[axis][stop]) for axis, (start, stop) in enumerate(box)).slices] += 1
    if not (wrong := np.argwhere(times != 1)).size:
        return None
    cell = wrong[0]
    count = times[tuple(cell)]
    where = Box((edges[place], edges[place + 1]) for edges, place in zip(cuts, cell, strict=True))
    return f"{where} of {list(whole)} is " + ("held by no rank" if count == 0 else f"held {count} times")
