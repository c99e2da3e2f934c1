"""Answers of competition mathematics: found in the reply, compared as LaTeX and as expressions."""

from __future__ import annotations

import logging
import re
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from tulu_mega.rewards.verdict import Messages, Verdict

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time-outs are off; the pool keeps time

_LONGEST_EXPRESSION = 400  # characters; no answer of MATH is near it, and parsing costs more than linearly
_WORD = re.compile(r"[A-Za-z]{3,}")
_PHRASE = re.compile(r"final answer\s*:\s*the final answer is(?P<answer>.*)", re.IGNORECASE)
_CLOSING = re.compile(r"\.?\s*I hope it is correct\.?.*", re.IGNORECASE)
_DOLLARS = re.compile(r"(?<!\\)(?:\\\\)*(?P<sign>\$\$?)")  # not those behind a backslash that is itself not escaped
_BRACKETED = re.compile(r"\\\((?P<a>.+?)\\\)|\\\[(?P<b>.+?)\\\]", re.DOTALL)
_BASE = re.compile(r"(?<=\d)(?<!\^\d)_(?:\{\(?(?P<braced>\w+)\)?\}|(?P<bare>\d+))")  # 1011_2, 43_{(6)}; not C^5_2
_BASE_NAMES = dict(
    zip("two three four five six seven eight nine ten eleven twelve sixteen".split(), (*range(2, 13), 16), strict=True)
)

_SIMPLER: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("\N{MINUS SIGN}", "-"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\limits", ""),
        (r"\\[!,;: ]|~|\\q?quad", " "),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", ""),
        (r"\\?\$|\\?%", ""),
        (r"\{,\}", ","),
        (r"(?<=[\d}])\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$", ""),  # a unit behind a value
        (r"\\(?:text|mbox|mathrm|textbf|mathbf|textit)\s*\{([^{}]*)\}", r"\1"),
        (r"^\s*[A-Za-z]\w?\s*(?:=|\\in\s)(?!=)", ""),  # x = 5, x \in [2, 3]
        (r"\s+", ""),
        (r"\.$", ""),
        (r"(?<!\d)\.(?=\d)", "0."),
        (r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}"),
        (r"\\frac([^{\\])(?=\{)", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\})([^{\\])", r"\1{\2}"),
        (r"\\sqrt([^{\\\[])", r"\\sqrt{\1}"),
        (r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"^(-?\d{1,3})(?:,\d{3})+(?:\.\d+)?$", lambda number: number[0].replace(",", "")),
    )
)


class MathAnswer:
    """The reply's answer is the ground truth's value, however it is written.

    Where the answer is looked for follows Tulu 3's code of November 2024: the last ``\\boxed`` and what "Final Answer: The
    final answer is" says are both candidates; without either, what stands between the last two dollars; without that, the
    whole reply. One candidate that is right suffices. A last box that is never closed (a truncated reply) gives no candidate.

    What counts as equal departs from it. The published code compared normalised LaTeX, then asked sympy whether the
    difference simplifies to 0; here it is normalised LaTeX, then math-verify, which also knows intervals, sets, matrices,
    equations and percentages: ``(1,2]`` is not ``(1,2)``, ``1,2`` is ``2,1``, ``50\\%`` is both 50 and 0.5, ``x = 5`` is 5;
    decimals count as equal when 6 places agree; of a chain ``5 = 2+3`` the last value counts. A word of three letters or
    more is only ever equal to the same word.

    Bases behind digits are compared too, which math-verify leaves out: ``1011_2`` is ``1011_{\\text{two}}``, not ``1011_3``.
    Where the ground truth has bases and the reply has none, the digits decide: the problem has named the base. A base where
    the ground truth has none is wrong, and so is the same value in another base.

    Other departures: ``\\fbox`` counts as ``\\boxed``; "I hope it is correct" need not follow the phrase; ``\\$`` is no
    dollar, ``$$`` is one, and a ``\\(...\\)`` or ``\\[...\\]`` counts that ends later; a reply is only compared whole when it is
    a single line without a box; nothing beyond 400 characters is compared symbolically. A comparison that takes too long is an
    error of the sample (the pool ends it), where the published code scored 0.
    """

    def __init__(self) -> None:
        _symbolically_equal("1", "2/3")  # builds the LaTeX parser, which is no sample's time to pay for

    def check(self, ground_truth: Any) -> None:
        if isinstance(ground_truth, (int, float)) and not isinstance(ground_truth, bool):
            return
        if not isinstance(ground_truth, str):
            raise ValueError(f"expected the answer as text (LaTeX) or a number, got {type(ground_truth).__name__}")
        if "\\boxed" in ground_truth:
            raise ValueError(f"expected what stands inside \\boxed{{...}} alone, got {ground_truth[:80]!r}")
        if not simpler(ground_truth):
            raise ValueError(f"expected the answer as text (LaTeX), got {ground_truth!r}, which is empty")

    def __call__(self, response: str, ground_truth: Any, *, messages: Messages | None = None) -> Verdict:
        expected, candidates = str(ground_truth), answers(response)
        for answer in candidates:
            if equivalent(expected, answer):
                return Verdict.of(True, f"answer {answer!r} equals {expected!r}")
        found = " and ".join(repr(answer[:80]) for answer in candidates) or "no answer"
        return Verdict.of(False, f"found {found}, expected {expected!r}")


def answers(response: str) -> list[str]:
    """The candidates for the reply's answer, at most two, best first.

    >>> answers(r"So $x=1$, hence \\boxed{\\frac{1}{2}}.")
    ['\\\\frac{1}{2}']
    """
    found = [answer for answer in (last_boxed(response), _phrase(response)) if answer]
    if found:
        return found
    if formula := _last_formula(response):
        return [formula]
    whole = response.strip()
    return [whole] if whole and not re.search(r"\n|\\boxed|\\fbox", whole) else []


def last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{...}`` or ``\\fbox{...}`` holds, braces balanced; of ``\\boxed 5`` what follows, up to ``$``.

    None without a box or when the last one is not closed.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].removeprefix("\\boxed").removeprefix("\\fbox")
    if not rest.lstrip().startswith("{"):
        return re.split(r"[$\n]", rest, maxsplit=1)[0].strip().rstrip(".") or None
    depth, begin = 0, rest.index("{")
    for at in range(begin, len(rest)):
        if rest[at] in "{}" and not _escaped(rest, at):
            depth += 1 if rest[at] == "{" else -1
            if depth == 0:
                return rest[begin + 1 : at].strip() or None
    return None


def equivalent(expected: str, answer: str) -> bool:
    """Whether two pieces of LaTeX say the same, as :class:`MathAnswer` describes."""
    plain_expected, plain_answer = simpler(expected), simpler(answer)
    if not plain_expected or not plain_answer:
        return False
    if plain_expected == plain_answer:
        return True
    if _bases(plain_expected) or _bases(plain_answer):
        plain_expected, plain_answer = plain_expected.rpartition("=")[2], plain_answer.rpartition("=")[2]
        if _bases(plain_answer) not in ([], _bases(plain_expected)):
            return False
        expected, answer = _BASE.sub("", plain_expected), _BASE.sub("", plain_answer)
        return equivalent(expected, answer)
    # As an expression a word is a product of its letters: "east" would equal "seat".
    return not _WORD.fullmatch(plain_expected) and _symbolically_equal(expected, answer)


def simpler(latex: str) -> str:
    """LaTeX without what does not change an answer's meaning: spacing, sizes, units, degrees, per cent, dollars.

    >>> simpler(r"\\dfrac12\\text{ cm}"), simpler(r"x = 1,200"), simpler("3/4")
    ('\\\\frac{1}{2}', '1200', '\\\\frac{3}{4}')
    """
    for pattern, replacement in _SIMPLER:
        latex = pattern.sub(replacement, latex.strip())
    return latex


def _bases(latex: str) -> list[str]:
    """The bases of a simplified answer's numbers in their order, ``["2"]`` of ``1011_{two}``."""
    named = [base["braced"] or base["bare"] for base in _BASE.finditer(latex)]
    return [str(_BASE_NAMES.get(name, name)) for name in named]


def _symbolically_equal(expected: str, answer: str) -> bool:
    # LaTeX extraction alone: math-verify's other ways hand text to sympy's parse_expr, which evaluates it.
    if max(len(expected), len(answer)) > _LONGEST_EXPRESSION:
        return False
    config = [LatexExtractionConfig()]
    plain = [re.sub(r"\\?\$", "", side) for side in (expected, answer)]
    sides = [parse(f"${side}$", config, parsing_timeout=None) for side in plain]
    return verify(*sides, timeout_seconds=None)


def _last_formula(response: str) -> str | None:
    """What stands between the last two dollars, or in ``\\(...\\)`` or ``\\[...\\]`` if that ends later.

    Counted from the end: a price early in the reply opens no formula.
    """
    spans = [(span.end(), span["a"] or span["b"]) for span in _BRACKETED.finditer(response)]
    if len(dollars := list(_DOLLARS.finditer(response))) > 1:
        spans.append((dollars[-1].end(), response[dollars[-2].end() : dollars[-1].start("sign")]))
    filled = [(end, text.strip()) for end, text in spans if text.strip()]
    return max(filled)[1] if filled else None


def _phrase(response: str) -> str | None:
    found = None
    for found in _PHRASE.finditer(response):  # noqa: B007  the last one
        pass
    return _CLOSING.sub("", found["answer"]).strip().rstrip(".").strip() or None if found else None


def _escaped(text: str, at: int) -> bool:
    before = text[:at]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


VERIFIER = MathAnswer
