"""LaTeX of answers, brought to one form: spellings, spacing, units, repeating decimals."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction

from tulu_mega.rewards.mathematics.units import factor_of, is_unit, unit_of

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u200a\u202f", " "),
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
        **{sign: f"^{power}" for sign, power in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", range(10), strict=True)},
        "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "∅": r"\emptyset ", "√": r"\sqrt ",
        "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
        "ℝ": r"\mathbb{R}", "€": "", "£": "", "±": r"\pm ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    }
)  # fmt: skip
_UPRIGHT = r"\\(?:text|mbox|hbox|textup|textrm|textnormal|textit|textbf|textsf|texttt|emph|mathrm|mathbf|mathit|mathsf)\s*"

Replacement = str | Callable[[re.Match[str]], str]


def _rules(*pairs: tuple[str, Replacement]) -> tuple[tuple[re.Pattern[str], Replacement], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def _repeating(found: re.Match[str]) -> str:
    """``0.1\\overline{6}`` as the fraction that it is."""
    whole, once = found["whole"] or "0", found["once"]
    again = re.sub(r"\D", "", found["again"])
    value = Fraction(int(whole + once + again) - int(whole + once), 10 ** len(once) * (10 ** len(again) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


_SPELLINGS = _rules(
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:left|right)(?![a-zA-Z])\.?|\\[bB]igg?[lr]?(?![a-zA-Z])|\\displaystyle|\\limits", ""),
    (r"(?<=\{)[bB]matrix(?=\})", "pmatrix"),
    (rf"(?<=\d)\s*\^\s*\{{?\s*{_UPRIGHT}\{{(?:st|nd|rd|th)\}}\s*\}}?", ""),  # ordinals
    (r"\\lbrace|\\rbrace", lambda found: "\\{" if found[0] == "\\lbrace" else "\\}"),
    (r"\\varnothing|\\O(?![a-zA-Z])|^\s*\\\{\s*\\\}\s*$", r"\\emptyset "),
    (r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])", r"\\le "),
    (r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])", r"\\ge "),
    (r"\\neq(?![a-zA-Z])", r"\\ne "),
    (r"\{\\(?:rm|it|bf)\s+([^{}]*)\}", r"\\text{\1}"),
    (r"(?<=\d)(?:\{,\}|,\\!|\\[,;: ])(?=\d{3}(?!\d))", ","),  # thousands
    (r"\{,\}", ","),
    (r"(?<!\\)\\[!,;:> ]|~|\\q?quad(?![a-zA-Z])", " "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![a-zA-Z])|\\textdegree", "°"),
    (rf"°\s*(?:{_UPRIGHT}\{{\s*)?[CF]\s*\}}?\s*$|°", ""),
    (r"\\?\$", ""),
    (rf"(?<=[\d}}])\s*{_UPRIGHT}\{{\s*(?:per\s?cent|%)\s*\}}\s*$|(?<=[\d}}])\s*per\s?cent\s*$", "%"),
    (r"(?P<whole>\d*)\.(?P<once>\d*)\\(?:overline|bar|overbar)\s*(?P<again>\{\d+\}|\d)", _repeating),
    (r"(?P<whole>\d*)\.(?P<once>\d*)(?P<again>\\dot\s*\{?\d\}?(?:\d*\\dot\s*\{?\d\}?)?)", _repeating),
    (r"(?P<whole>\d+)\.(?P<once>\d*)(?P<again>\(\d+\))", _repeating),
    (rf"{_UPRIGHT}\{{\s*\(?\s*(?:in\s+)?base\s*[-~]?\s*(\w+)\s*\)?\s*\}}\s*$", r"_{\1}"),
    (r"(?<=\d)\s*\(?\s*base\s*[-~]?\s*(\w+)\s*\)?\s*$", r"_{\1}"),
    (rf"(?<=[\d}}])\s*{_UPRIGHT}\{{\s*([ie])\s*\}}", r" \1 "),  # upright constants
    (r"^\s*(?:\\therefore|\\Rightarrow|\\implies|\\approx|\\simeq|=)\s*", ""),
)
_TIME = re.compile(rf"(?<=\d)\s*(?P<text>{_UPRIGHT}\{{)?\s*(?P<half>[aApP])(?P<dot>\.)?\s?[mM]\.?\s*\}}?\s*$")
_TAIL = re.compile(rf"\s*(?P<joint>/|\\cdot|\\times)?\s*{_UPRIGHT}\{{(?P<words>[^{{}}]*)\}}(?:\^\s*\{{?-?\d\}}?)?\s*$")
_BARE_TAIL = re.compile(r"(?<=[\d})])(?:\s+(?P<words>[A-Za-z][A-Za-z. ]*)|(?P<symbol>[a-z]{2,3}))(?P<power>\^\s*\{?\d\}?)?\s*$")
_PLAIN = _rules(
    (rf"{_UPRIGHT}\{{([^{{}}]*)\}}", r" \1 "),
    (r"\\?%", ""),
)
_LISTED = re.compile(r"\s*,?\s*(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])\s*|;")
_ASSIGNED = re.compile(r"^\s*[A-Za-z]\w?\s*(?:=|\\approx(?![a-zA-Z])|\\simeq(?![a-zA-Z])|\\in(?![a-zA-Z]))(?!=)([^=]*)$")
_ARGUMENTS = _rules(
    (r"(?<![\d}])\.(?=\d)", "0."),
    (r"^(-?\d+(?:\.\d+)?)[eE]([-+]\d+)$", r"\1\\times 10^{\2}"),  # 1.5e-07, as programs write
    (r"\\frac\s*(\\pi|[^{\\\s])\s*(\\pi(?![a-zA-Z])|[^{\\\s])", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\\pi|[^{\\\s])\s*(?=\{)", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})\s*(\\pi(?![a-zA-Z])|[^{\\\s])", r"\1{\2}"),
    (r"\\sqrt\s*(\[[^\]]*\])?\s*(\\pi|[^{\\\[\s])", lambda found: rf"\sqrt{found[1] or ''}{{{found[2]}}}"),
)
_SQUEEZED = _rules(
    (r"^\s*[A-Za-z]\w?\s*(?:=|\\approx(?![a-zA-Z])|\\simeq(?![a-zA-Z])|\\in(?![a-zA-Z]))(?!=)", ""),  # x = 5, x \in [2, 3]
    (r"\s+", ""),
    (r"\.$", ""),
    (r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
    (r"^\+(?=[\d.])", ""),
    (r"^(-?\d{1,3})(?:,\d{3})+(?:\.\d+)?$", lambda number: number[0].replace(",", "")),
)


@dataclass(frozen=True)
class Latex:
    """An answer, read."""

    text: str
    """what a parser gets: spaces kept, no units, no text commands, no sign of per cent"""
    unit: str
    """name of the unit behind the value, the same for all spellings; empty without a common unit"""
    percent: bool
    half: str
    """``a`` or ``p`` for a time before or after noon"""

    @property
    def listed(self) -> str:
        """The text with commas for "and" and "or"."""
        return _LISTED.sub(", ", self.text).strip()

    @property
    def value(self) -> str:
        """The listed text without ``x =`` before a single value."""
        return _ASSIGNED.sub(r"\1", self.listed).strip()

    @property
    def simple(self) -> str:
        """The listed text without what does not matter to its meaning, for comparing as text."""
        return _applied(_SQUEEZED, self.value)


def read(latex: str) -> Latex:
    """LaTeX without what does not change an answer's meaning."""
    text = _applied(_SPELLINGS, latex.translate(_CHARACTERS).strip())
    half = ""
    if (time := _TIME.search(text)) and (time["text"] or time["dot"] or ":" in text):
        half, text = time["half"].lower(), text[: time.start()]
    text, unit = _without_unit(text)
    percent = "%" in text
    return Latex(_applied(_ARGUMENTS, _applied(_PLAIN, text)).strip(), unit, percent, half)


def simpler(latex: str) -> str:
    """LaTeX without what does not change an answer's meaning: spacing, sizes, units, degrees, per cent, dollars.

    >>> simpler(r"\\dfrac12\\text{ cm}"), simpler(r"x = 1,200"), simpler("3/4")
    ('\\\\frac{1}{2}', '1200', '\\\\frac{3}{4}')
    """
    return read(latex).simple


def _applied(rules: tuple[tuple[re.Pattern[str], Replacement], ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_unit(text: str) -> tuple[str, str]:
    """The text without the unit at its end, and the unit's name; thousand, million and the like are multiplied."""
    body, words = text, []
    while (tail := _TAIL.search(body)) and body[: tail.start()].rstrip():
        words.insert(0, tail["words"])
        body = body[: tail.start()]
    upright = bool(words)
    if not words and (tail := _BARE_TAIL.search(body)):
        words, body = [tail["words"] or tail["symbol"]], body[: tail.start()]
        if tail["symbol"] and not unit_of(tail["symbol"]):
            return text, ""
    if not words or not re.search(r"[\d})!]$|\\(?:pi|infty)$|[a-zA-Z]$", body.rstrip()):
        return text, ""
    said = " ".join(word.strip() for word in words).strip()
    factor, rest = factor_of(said)
    if rest and not is_unit(rest, upright):
        return text, ""
    if factor > 1:
        body = _multiplied(body.strip(), factor)
    return body, unit_of(rest)


def _multiplied(value: str, factor: int) -> str:
    plain = value.replace(",", "")
    if re.fullmatch(r"-?\d+(?:\.\d+)?", plain):
        product = Fraction(plain) * factor
        if product.denominator == 1:
            return str(product)
        return f"{Context(prec=1000).multiply(Decimal(plain), Decimal(factor)):f}".rstrip("0")
    return rf"({value})\cdot {factor}"
