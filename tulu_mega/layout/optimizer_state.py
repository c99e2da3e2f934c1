"""The size of the optimizer's state, which the trainer saves and the planner counts."""

from __future__ import annotations

from typing import Literal

STATE_BYTES = 12
"""Bytes of a parameter's float32 main parameter and two float32 moments, as a checkpoint has them."""


def state_bytes(moments: Literal["fp32", "bf16"], main: bool = True) -> int:
    """Bytes of optimizer state that a parameter takes, in memory and in a checkpoint.

    Args:
        moments: as `optim.moments`.
        main: whether there is a main parameter beside the parameter, as of bf16 ones.
    """
    return 4 * main + 2 * (4 if moments == "fp32" else 2)


PIECE = 2**24
"""Elements of it that a checkpoint has in one piece at most."""
