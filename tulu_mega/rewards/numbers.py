"""The scores and rewards that training accepts as numbers."""

from __future__ import annotations

import numbers
from decimal import Decimal
from typing import Any

LARGEST = 3.4028234663852886e38
"""Largest number of float32, in which losses are computed: anything above is an infinity there."""
EXPECTED = "a finite number (of Python's, or a scalar of numpy or torch)"


def number(value: Any) -> float | None:
    """The value as a float; None where it is no number, is not finite, or is too large for float32.

    Numbers are Python's (bool, int, float, Fraction, Decimal), and the scalars of numpy and torch, which have an ``item``. Text
    is none, even where it spells one.
    """
    try:
        if not isinstance(value, numbers.Real | Decimal):  # float32 and bool of numpy, and torch's scalars
            value = value.item()
        if not isinstance(value, numbers.Real | Decimal):
            return None
        found = float(value)
    except (AttributeError, TypeError, ValueError, RuntimeError, ArithmeticError):
        return None
    return found if abs(found) <= LARGEST else None
