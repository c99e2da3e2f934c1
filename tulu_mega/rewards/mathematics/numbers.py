"""Numbers compared: exactly, or as closely as a decimal was written."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import sympy

Number = tuple[Fraction, bool]
"""the value, and whether it was written as a decimal"""

_PLACES, _DIGITS = Fraction(1, 2 * 10**6), Fraction(5, 10**5)  # half of the sixth place, half of the fifth significant digit
_EXACT, _NOTHING = sympy.Rational(1, 10**40), sympy.Rational(1, 10**50)  # of numbers computed to 60 digits
_FLOAT = sympy.Rational(1, 10**14)  # what a parsed decimal keeps
_DECIMAL = re.compile(r"[-+]?\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_FRACTION = re.compile(r"([-+]?)(\d*)\\frac\{(-?\d+)\}\{(-?\d+)\}")
_MOST_DIGITS = 10_000
_SAMPLES = (1.3717, 0.6113, 2.2931, 1.7351, 0.8387, 3.1193, 2.7043)
_GROWING = (sympy.factorial, sympy.binomial, sympy.gamma, sympy.exp, sympy.factorial2, sympy.subfactorial, sympy.fibonacci)


def number_of(text: str) -> Number | None:
    """The value of a numeral (integer, decimal, fraction, mixed number); None of anything else."""
    plain = text.strip()
    if _THOUSANDS.fullmatch(plain):
        plain = plain.replace(",", "")
    if _DECIMAL.fullmatch(plain):
        return Fraction(plain), "." in plain
    if found := _FRACTION.fullmatch(plain):
        sign, whole, above, below = found[1], int(found[2] or 0), int(found[3]), int(found[4])
        if below == 0 or (whole and min(above, below) < 0):
            return None
        value = whole + Fraction(above, below)
        return (-value if sign == "-" else value), False
    return None


def numbers_equal(left: Number, right: Number) -> bool:
    """Equal; or, where one is a decimal, alike in six places and five significant digits: 0.333333 is a third."""
    return left[0] == right[0] or ((left[1] or right[1]) and _close(left[0], right[0]))


def computable(value: Any) -> bool:
    """Return whether a parsed value is small enough to be computed: ``9^{9^{9}}`` is not."""
    return _digits(value) <= _MOST_DIGITS


def is_number(value: Any) -> bool:
    """Whether what was parsed is an expression without variables."""
    return isinstance(value, sympy.Expr) and bool(value.is_number)


def differ(left: Any, right: Any) -> bool:
    """Whether two parsed answers, part by part, have numbers that are surely not equal.

    math-verify rounds to six places wherever numbers meet, so that all small ones are equal to it; of plain numbers this says
    everything, of other things it only says what cannot be.
    """
    if isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase):
        return left.shape == right.shape and any(map(differ, left.flat(), right.flat()))
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return _expressions_differ(left, right)
    if isinstance(left, sympy.Interval) and isinstance(right, sympy.Interval):
        return differ(left.start, right.start) or differ(left.end, right.end)
    if isinstance(left, sympy.core.relational.Relational) and isinstance(right, sympy.core.relational.Relational):
        return left.lhs == right.lhs and differ(left.rhs, right.rhs)
    if isinstance(left, sympy.FiniteSet | sympy.Tuple) and isinstance(right, sympy.FiniteSet | sympy.Tuple):
        sides = [list(side.args) for side in (left, right)]
        if len(sides[0]) != len(sides[1]) or not all(map(is_number, sides[0] + sides[1])):
            return False
        if isinstance(left, sympy.FiniteSet) and isinstance(right, sympy.FiniteSet):
            sides = [sorted(side, key=lambda value: (complex(value).real, complex(value).imag)) for side in sides]
        return any(map(differ, *sides))
    return False


def _expressions_differ(left: sympy.Expr, right: sympy.Expr) -> bool:
    if left == right:
        return False
    if is_number(left) and is_number(right):
        left, right = left.doit(), right.doit()
        if left.is_Rational and right.is_Rational and not (left.has(sympy.Float) or right.has(sympy.Float)):
            return left != right
    else:
        symbols = sorted(left.free_symbols | right.free_symbols, key=str)
        values = dict(zip(symbols, _SAMPLES, strict=False))
        if len(symbols) > len(_SAMPLES):
            return False
        decimals = left.has(sympy.Float) or right.has(sympy.Float)
        try:
            sides = [complex(side.subs(values)) for side in (left, right)]
        except (TypeError, ValueError, ArithmeticError):
            return False
        apart, size = abs(sides[0] - sides[1]), max(map(abs, sides))
        return apart > (5e-5 if decimals else 1e-8) * size
    decimals = left.has(sympy.Float) or right.has(sympy.Float)
    first, second = sympy.N(left, 60), sympy.N(right, 60)
    if not (first.is_finite and second.is_finite):
        return first != second
    apart, size = abs(first - second), max(abs(first), abs(second))
    if decimals:
        return not (_close(first, second) or apart <= _FLOAT * size)
    return not (size < _NOTHING or apart <= _EXACT * size)


def _close(left: Any, right: Any) -> bool:
    apart = abs(left - right)
    return bool(apart <= _PLACES and apart <= _DIGITS * max(abs(left), abs(right)))


def _digits(value: Any) -> float:
    """Return an upper bound of a parsed value's decimal digits; infinity where no useful bound is known."""
    if isinstance(value, sympy.Integer):
        return int(value).bit_length() * 0.302 + 1
    if isinstance(value, sympy.Rational):
        return (value.p.bit_length() + value.q.bit_length()) * 0.302 + 1
    if isinstance(value, sympy.Float):
        return abs(value.num.exp + value.num.bc) * 0.302 + 16
    if isinstance(value, sympy.Pow):
        of_exponent = _digits(value.exp)
        return _digits(value.base) * max(_magnitude(value.exp, of_exponent), 1) + of_exponent
    if isinstance(value, _GROWING):
        most = max(_magnitude(part, _digits(part)) for part in value.args)
        return most * math.log10(most + 10)
    parts = value.flat() if isinstance(value, sympy.MatrixBase) else value.args if isinstance(value, sympy.Basic) else ()
    return sum(map(_digits, parts)) if parts else 1.0


def _magnitude(value: Any, digits: float) -> float:
    if isinstance(value, sympy.Rational):
        return min(abs(value.p) / value.q, 1e300) if value.p.bit_length() < 1000 else math.inf
    return 10.0**digits if digits < 300 else math.inf
