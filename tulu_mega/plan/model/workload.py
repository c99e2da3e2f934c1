"""The sequences of a step: lengths like those of Tulu 3's data, packed as the trainer packs them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from tulu_mega.data.packing import plan_step
from tulu_mega.layout.alignment import Alignment
from tulu_mega.layout.cost import sequence_flops
from tulu_mega.layout.schedule import Pipeline
from tulu_mega.plan.model.job import Pack

ROWS = {
    "allenai/tulu-3-sft-mixture": 939_344,
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": 271_409,
    "allenai/llama-3.1-tulu-3-70b-preference-mixture": 334_302,
    "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints": 29_946,
}
"""Rows of published data sets (Tulu 3, arXiv 2411.15124)."""
LABELLED = 0.6
"""Share of a conversation's tokens that are trained, roughly: answers are longer than questions."""
_SPREAD = 0.9
"""Standard deviation of the lengths' logarithm."""
_SHORTEST = 16


def draw_lengths(count: int, mean: int, longest: int, seed: int) -> list[int]:
    """Log-normal lengths, most of them short and some as long as they may be.

    Args:
        mean: tokens, before the longest are cut.
        longest: tokens.
        seed: the same lengths follow from it.
    """
    drawn, middle = random.Random(seed), math.log(mean) - _SPREAD**2 / 2
    shortest = min(_SHORTEST, longest)
    return [max(shortest, min(longest, round(drawn.lognormvariate(middle, _SPREAD)))) for _ in range(count)]


def pack_step(
    lengths: Sequence[int],
    labelled: Sequence[int],
    replicas: int,
    capacity: int,
    align: Alignment,
    pipeline: Pipeline,
    hidden: int,
    ffn: int,
    micro_batches: int | None = None,
    together: int = 1,
) -> tuple[tuple[Pack, ...], ...]:
    """A global batch as each replica's micro-batches.

    Args:
        lengths: tokens of each sequence.
        labelled: how many of these are trained.
        replicas, capacity, align, micro_batches, together: as for `plan_step`.
        pipeline: whose schedule orders the packs.
        hidden, ffn: of the model, for the cost of a length.

    Raises:
        UserError: as `plan_step`.
    """
    cost = sequence_flops(hidden, ffn, layers=1)
    plan = plan_step(
        lengths, replicas, capacity, align, micro_batches, cost, multiple=pipeline.multiple, pipeline=pipeline, together=together
    )

    def pack(members: Sequence[int]) -> Pack:
        own = tuple(lengths[index] for index in members)
        total = align.padded_total(sum(map(align.padded_sequence, own)))
        return Pack(total, own, sum(labelled[index] for index in members))

    return tuple(tuple(pack(members) for members in packs) for packs in plan)
