"""Equality of two mathematical answers: as text, as numbers, or by math-verify."""

from __future__ import annotations

import logging
import re

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from tulu_mega.rewards.cpu_limit import TooLong, cpu_limit
from tulu_mega.rewards.mathematics.latex import Latex, read
from tulu_mega.rewards.mathematics.numbers import computable, differ, is_number, number_of, numbers_equal

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time-outs are off; the pool keeps time

LONGEST = 400
"""Most characters of an answer that is parsed. No answer of MATH is near it, and parsing costs more than linearly."""
_DEEPEST, _MOST_POWERS = 12, 20  # nesting; the parser's time grows with the powers of both
SECONDS = 5.0
"""CPU time of a comparison, as in the published code; what takes longer is not equal."""

_BASE = re.compile(r"(?<=\d)(?<!\^\d)_(?:\{\(?(?P<braced>\w+)\)?\}|(?P<bare>\d+))")  # 1011_2, 43_{(6)}; not C^5_2
_BASE_NAMES = dict(
    zip("two three four five six seven eight nine ten eleven twelve sixteen".split(), (*range(2, 13), 16), strict=True)
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp max min gcd lcm det lim sqrt mod".split()
)
_NUMERAL = re.compile(r"[-+]?(?:\d+(?:\.\d+)?(?:\\(?:times|cdot)10\^(?:\{-?\d+\}|\d))?|(?:\d+)?\\frac\{-?\d+\}\{\d+\})")
_INTEGER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:\\(?:times|cdot)10\^(?:\{-?\d+\}|\d))?")
_UNDONE = re.compile(r"\\(?:i{0,3}int|oint|sum|prod|lim|det)(?![a-zA-Z])|vmatrix")
_SUM = re.compile(r"\d\}?\)?[-+]\(?(?:\\frac\{)?\d")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt)(?![a-zA-Z])")
_CONFIG = [LatexExtractionConfig(normalization_config=NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False))]  # fmt: skip


def equivalent(expected: str, answer: str, given_as_answer: bool = True, unevaluated: bool = False) -> bool:
    """Return whether two pieces of LaTeX are equal, as :class:`tulu_mega.rewards.verifiers.math.MathAnswer` defines it.

    Args:
        given_as_answer: False for a mere formula, which may restate the question: where a numeral is expected, it must be one.
        unevaluated: take sums, integrals and the like for what they come to.
    """
    if max(len(expected), len(answer)) > LONGEST:
        return "".join(expected.split()) == "".join(answer.split())
    left, right = read(expected), read(answer)
    if not left.simple or not right.simple or (left.unit and right.unit and left.unit != right.unit):
        return False
    if left.half or right.half:
        return left.simple == right.simple and len({left.half, right.half} - {""}) == 1
    if left.simple == right.simple:
        return not _another_percentage(left, right)
    if not unevaluated and _undone(left.simple, right.simple, given_as_answer):
        return False
    if _tangled(right.simple) or _tangled(left.simple):
        return False
    try:
        with cpu_limit(SECONDS):
            return _same_value(left, right)
    except (TooLong, MemoryError, RecursionError):
        return False  # a reply that cannot be compared is no right one, whatever it holds


def bases(latex: str) -> list[str]:
    """The bases of a simplified answer's numbers in their order, ``["2"]`` of ``1011_{two}``."""
    named = [base["braced"] or base["bare"] for base in _BASE.finditer(latex)]
    return [str(_BASE_NAMES.get(name, name)) for name in named]


def _same_value(left: Latex, right: Latex) -> bool:
    plain_left, plain_right = left.simple, right.simple
    if bases(plain_left) or bases(plain_right):
        plain_left, plain_right = plain_left.rpartition("=")[2], plain_right.rpartition("=")[2]
        if bases(plain_right) not in ([], bases(plain_left)):
            return False
        return equivalent(_BASE.sub("", plain_left), _BASE.sub("", plain_right))
    # As an expression a word is a product of its letters: "east" would equal "seat".
    if _WORD.fullmatch(plain_left) or _words(left.listed) != _words(right.listed):
        return False
    hundredth = rf"\frac{{{right.value}}}{{100}}"
    if _another_percentage(left, right):
        return _equal(left.value, hundredth)
    equations = "=" in left.listed and "=" in right.listed
    if _equal(*((left.listed, right.listed) if equations else (left.value, right.value))):
        return True
    if left.percent and not right.percent:  # 0.5 says 50%
        return _equal(rf"\frac{{{left.value}}}{{100}}", right.value)
    value = number_of(plain_left)
    if right.percent and not left.percent and (value is None or value[0].denominator > 1):  # and 150% is 3/2
        return _equal(left.value, hundredth)
    if _RELATION.search(left.text) or _RELATION.search(right.text):
        sides = [_as_set(side.text) for side in (left, right)]
        return None not in sides and sides[0] == sides[1]
    return False


def _another_percentage(left: Latex, right: Latex) -> bool:
    """Return whether `right` is a percentage and `left` a number from 0 to 1 without the sign: 50% is 0.5, and 0.5% is not."""
    value = number_of(left.simple)
    return right.percent and not left.percent and value is not None and 0 < value[0] <= 1


def _undone(expected: str, answer: str, given_as_answer: bool) -> bool:
    """Return whether the answer is not calculated: a restatement of the question is no answer."""
    if _UNDONE.search(answer) and not _UNDONE.search(expected):
        return True
    if not _NUMERAL.fullmatch(expected):
        return False
    numeral = _INTEGER if _INTEGER.fullmatch(expected) and not given_as_answer else _NUMERAL
    if any(numeral.fullmatch(part) for part in re.split(r"=|\\approx", answer)):
        return False
    return not given_as_answer or _SUM.search(answer) is not None


def _tangled(text: str) -> bool:
    """Return whether an answer is nested more deeply than real answers are."""
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest > _DEEPEST or text.count("^") > _MOST_POWERS


def _words(text: str) -> list[str]:
    return sorted(word for word in _WORD.findall(text) if word not in _FUNCTIONS)


def _equal(expected: str, answer: str) -> bool:
    left, right = number_of(expected), number_of(answer)
    if left is not None and right is not None:
        return numbers_equal(left, right)
    # LaTeX extraction alone: math-verify's other ways hand text to sympy's parse_expr, which evaluates it.
    sides = [parse(f"${side}$", _CONFIG, parsing_timeout=None) for side in (expected, answer)]
    found = [next((value for value in side if not isinstance(value, str)), None) for side in sides]
    if not all(map(computable, found)):
        return False
    if None not in found:
        if differ(*found):
            return False
        if all(map(is_number, found)):
            return True
    if any(isinstance(one, sympy.FiniteSet) and isinstance(other, Relational) for one, other in (found, found[::-1])):
        return False
    if any(isinstance(one, Relational) and not isinstance(one, sympy.Eq) and not one.free_symbols for one in found):
        return False  # 1<2 is true, which is nobody's answer
    return verify(*sides, timeout_seconds=None, allow_set_relation_comp=True)


def _as_set(text: str) -> sympy.Set | None:
    """The real numbers that inequalities joined by "or" and "and" allow, or a set; None where it is neither."""
    union = sympy.S.EmptySet
    for clause in re.split(r"(?<![\\A-Za-z])or(?![A-Za-z])|\\lor|\\vee", text):
        common = sympy.S.UniversalSet
        for part in re.split(r"(?<![\\A-Za-z])and(?![A-Za-z])|\\land|\\wedge", clause):
            parsed = parse(f"${part.strip().strip(',')}$", _CONFIG, parsing_timeout=None)
            found = next((value for value in parsed if not isinstance(value, str)), None)
            if found is None or not computable(found) or (isinstance(found, sympy.Expr) and not isinstance(found, Boolean)):
                return None
            try:
                found = found if isinstance(found, sympy.Set) else found.as_set()
                common = common.intersect(found)
            except (AttributeError, TypeError, ValueError, NotImplementedError):
                return None
        union = union.union(common)
    return union
