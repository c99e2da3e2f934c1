"""Multiples that a layout and an FP8 recipe require of lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FP8_MULTIPLE = {None: 1, "delayed": 16, "tensorwise": 16, "blockwise": 128}
"""For each recipe, the number that divides every extent of an FP8 product."""


@dataclass(frozen=True)
class Alignment:
    """Multiples that the layout requires of each sequence's length and of the packed total."""

    sequence: int = 1
    total: int = 1

    def padded_sequence(self, length: int) -> int:
        """Tokens a sequence occupies in a pack."""
        return -(-length // self.sequence) * self.sequence

    def padded_total(self, length: int) -> int:
        """Tokens of a pack that holds so many."""
        return max(1, -(-length // self.total)) * self.total


def alignment(
    tensor: int = 1,
    sequence_parallel: bool = False,
    context: int = 1,
    fp8: Literal["delayed", "tensorwise", "blockwise"] | None = None,
) -> Alignment:
    """The alignment of a layout.

    Context parallelism cuts each sequence into ``2 * context`` equal pieces. What is left of the pack on a rank must divide
    over the tensor group (sequence parallelism), and each share must be a multiple of what the FP8 recipe asks for.
    """
    pieces = 2 * context if context > 1 else 1
    shards = tensor if sequence_parallel else 1
    return Alignment(sequence=pieces, total=math.lcm(pieces, context * shards * FP8_MULTIPLE[fp8]))
