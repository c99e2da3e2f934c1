"""Numbers that carry the arithmetic which gave them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """A value, and the arithmetic that gives it in words that a calculator takes: ``x`` is times."""

    value: float
    text: str
    binds: int = 3
    """how strongly the text holds together: 1 a sum, 2 a product or quotient, 3 one number"""

    def __add__(self, other: Number) -> Number:
        return Number(self.value + other.value, f"{self.text} + {other.text}", 1)

    def __mul__(self, other: Number) -> Number:
        return Number(self.value * other.value, f"{self._within(2)} x {other._within(3)}", 2)

    def __truediv__(self, other: Number) -> Number:
        return Number(self.value / other.value, f"{self._within(2)} / {other._within(3)}", 2)

    def _within(self, binds: int) -> str:
        return self.text if self.binds >= binds else f"({self.text})"


def number(value: float) -> Number:
    """A number by itself: whole ones whole, others to five digits."""
    return Number(value, f"{value:.0f}" if value == round(value) and abs(value) < 1e12 else f"{value:.5g}")
