"""The size of the optimizer's state, which the trainer saves and the planner counts."""

from __future__ import annotations

STATE_BYTES = 12
"""Bytes of a parameter's float32 main parameter and two moments, as a checkpoint has them."""
PIECE = 2**24
"""Elements of it that a checkpoint has in one piece at most."""
