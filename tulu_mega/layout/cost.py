"""The cost of computing a packed sequence."""

from __future__ import annotations

from collections.abc import Callable

Cost = Callable[[int], float]
"""Relative cost of a sequence of that many tokens."""


def sequence_flops(hidden: int, ffn: int, layers: int, vocabulary: int = 0, kv_width: int | None = None) -> Cost:
    """FLOPs of a forward pass over one sequence: matrix products grow with its length, attention with the square.

    Args:
        hidden: model width.
        ffn: width of the gated feed-forward.
        layers: transformer layers.
        vocabulary: columns of the output layer; 0 leaves it out.
        kv_width: key/value heads times head size, ``hidden`` when unset.
    """
    kv = hidden if kv_width is None else kv_width
    weights = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn) + hidden * vocabulary
    linear = 2.0 * weights
    quadratic = 2.0 * layers * hidden  # QK^T and PV, 2 FLOPs a product each, half of them under the causal mask
    return lambda length: (linear + quadratic * length) * length
