"""A check that an answer is calculated as far as its ground truth is."""

from __future__ import annotations

import re
from fractions import Fraction

from tulu_mega.rewards.mathematics.latex import read
from tulu_mega.rewards.mathematics.numbers import number_of, numbers_equal

_SCIENTIFIC = r"\d+(?:\.\d+)?\\(?:times|cdot)10\^(?:\{-?\d+\}|\d)"
_DECIMAL = re.compile(rf"[-+]?(?:{_SCIENTIFIC}|\d+(?:\.\d+)?|\.\d+)")
_NUMERAL = re.compile(rf"{_DECIMAL.pattern}|[-+]?\d*\\frac\{{-?\d+\}}\{{-?\d+\}}")
_POWER = r"\d+(?:\^(?:\d|\{\d+\}))?"
_PRODUCT = re.compile(rf"[-+]?{_POWER}(?:\\(?:times|cdot){_POWER})*")
_LONG = 13  # digits from which on a power or a product may stand for an integer
_SAYS = re.compile(r"(=|\\approx(?![a-zA-Z])|\\simeq(?![a-zA-Z]))")
_LETTER = re.compile(r"\\[a-zA-Z]+|[a-df-hj-zA-Z]")  # but for e and i, which are numbers
_CONSTANTS = {"\\pi", "\\frac", "\\sqrt", "\\cdot", "\\times", "\\pm", "\\infty", "\\div"}
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt)(?![a-zA-Z])")  # of a set of numbers
_OPERATIONS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?(?![a-zA-Z])",
        r"\\(?:log|ln|lg)(?![a-zA-Z])",
        r"\\(?:max|min|sup|inf)(?![a-zA-Z])",
        r"\\(?:gcd|lcm)(?![a-zA-Z])|\\operatorname",
        r"\\[lr](?:floor|ceil)|\\[lr]?vert(?![a-zA-Z])|\|",
        r"!|\\[dt]?binom(?![a-zA-Z])|\\choose(?![a-zA-Z])",
        r"\\[bp]?mod(?![a-zA-Z])",
    )
)
"""Kinds of operations that an answer may leave uncalculated, if the ground truth has one of the same kind."""


def finished(expected: str, answer: str) -> bool:
    """Whether an answer that is equal in value to the ground truth is also calculated as far.

    Where the ground truth is a numeral the answer is one: an integer or decimal where an integer is expected, also a fraction
    where a fraction or decimal is; a power or product of integers only for one of 13 digits or more. Every value of a chain
    (``3\\cdot 4 = 12``, ``\\frac13 \\approx 0.33``) that is a numeral has to be the same. Where the ground truth is a constant
    such as ``\\frac{\\pi}{4}``, the answer leaves no function to be calculated of a kind that the ground truth has not.

    >>> finished("4", "2+2"), finished("12", "3\\\\cdot 4 = 12"), finished("4", "4 = 5"), finished("\\\\frac12", "\\\\frac24")
    (False, True, False, True)
    """
    truth, given = read(expected).simple, read(answer).simple
    if truth == given:
        return True
    if not _NUMERAL.fullmatch(truth):
        names = {name for name in _LETTER.findall(truth) if name not in _CONSTANTS}
        named = any(not name.startswith("\\") for name in names)  # has variables: then a function may be the answer's form
        if named or _RELATION.search(given):
            return True
        return not any(kind.search(given) and not kind.search(truth) for kind in _OPERATIONS)
    *before, last = _chain(_bare(given))
    value = number_of(truth)
    whole = value is not None and value[0].denominator == 1
    plain = _DECIMAL if whole else _NUMERAL
    long = whole and len(str(abs(value[0].numerator))) >= _LONG
    fits = [bool(plain.fullmatch(text) or (long and _PRODUCT.fullmatch(text))) for _, text in (*before, last)]
    return any(fits) and _agree([*before, last])


def _bare(text: str) -> str:
    """Return the text without a pair of brackets that encloses all of it."""
    for opening, closing in (("(", ")"), ("\\{", "\\}"), ("{", "}")):
        inner = text[len(opening) : len(text) - len(closing)]
        if text.startswith(opening) and text.endswith(closing) and not set(inner) & set("(){}"):
            return inner
    return text


def _chain(text: str) -> list[tuple[str, str]]:
    """The members of ``a = b \\approx c``, each with the sign before it."""
    first, *rest = _SAYS.split(text)
    return [("=", first), *zip(rest[::2], rest[1::2], strict=True)]


def _agree(chain: list[tuple[str, str]]) -> bool:
    """Return whether all numerals of a chain have one value; those behind ``\\approx`` count to their last written place."""
    numbers = [(sign, text, value) for sign, text in chain if (value := number_of(text)) is not None]
    for (_, _, left), (sign, text, right) in zip(numbers, numbers[1:], strict=False):
        if numbers_equal(left, right):
            continue
        places = len(text.partition(".")[2])
        if sign == "=" or "." not in text or abs(left[0] - right[0]) > Fraction(1, 2 * 10**places):
            return False
    return True
