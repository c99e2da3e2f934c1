"""Searches for the answer in a reply. Every scan reads the reply once: replies are long, and policies write anything."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PHRASE = re.compile(r"final answer\s*:\s*the final answer is(?P<rest>[^\n]*)", re.IGNORECASE)
_CLOSING = re.compile(r"I hope it is correct", re.IGNORECASE)
_MARKS = re.compile(r"\\\\|\\\$|\\[()\[\]]|\$\$?")  # backslashes in pairs and escaped dollars mark nothing
_JOINT = (
    r"(?:[\s$,;:.()/{}]|\\[,;:!() \[\]]|\\q?quad|\\(?:lor|land|vee|wedge|text|mbox|textrm|mathrm)(?![a-zA-Z])"
    r"|\b(?:and|or|maybe|perhaps|possibly|also|either|it|is|else|alternatively)\b)"
)
_JOINED = re.compile(rf"{_JOINT}{{0,40}}")
_LISTS = re.compile(rf"{_JOINT}{{0,40}}(?:[+-]?[$\d]|\\(?:[dt]?frac|sqrt|pi|\(|\[|[bf]box))")
_OR = re.compile(r"\b(?:or|maybe|perhaps|possibly|alternatively)\b|\\(?:lor|vee)(?![a-zA-Z])")
_PARTED = re.compile(r",(?!\d{3})|;|\b(?:and|or|maybe|perhaps|possibly|also|alternatively)\b")
_TAKEN_BACK = re.compile(
    r"[\s$.,)}]*+(?:which\s|that\s)?\s?(?:is|was|are|were|would be)\s"
    r"(?:wrong|incorrect|false|no answer|not (?:it|correct|right|(?:the|my) (?:correct |right |final )?answer)\b)"
)
_MOST_BOXES = 8  # that are read as one list
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_CLOSES = {"\\)": "\\(", "\\]": "\\["}


@dataclass(frozen=True)
class Candidate:
    """A piece of the reply that may be its answer."""

    text: str
    given_as_answer: bool
    """whether it is boxed or follows the phrase; otherwise it is the last formula or the whole reply"""


def candidates(response: str) -> list[Candidate]:
    """The candidates for the reply's answer, best first.

    The last box and what the phrase says are both candidates; of the phrase's words the first formula, and all of them
    where they are more than that. Without either it is the last formula, without that a reply of a single line.
    """
    given = [last_boxed(response), *_phrase(response)]
    if found := [Candidate(text, True) for text in dict.fromkeys(given) if text]:
        return found
    if formulas := _formulas(response, from_end=True):
        return [Candidate(formulas[-1], False)]
    whole = response.strip()
    return [Candidate(whole, False)] if whole and not re.search(r"\n|\\boxed|\\fbox", whole) else []


Ways = list[list[Candidate]]
"""Readings of one place, each a list of candidates; the place is right if all candidates of one reading are."""


def answers(response: str) -> list[Ways]:
    """The candidates of a reply that has to give one answer: the places where it gives one, all of which must be right.

    The last box and what the phrase says are places. Boxes and formulas that are joined by "and", "or" or commas (mere formulas
    by "or") are one list, which is right as a list, or where all of it says the same (``$\\frac12$, or $0.5$``). An answer that
    is taken back ("4 is wrong, it is 3") is none.
    """
    given = [ways for ways in (_boxes(response), _phrase_ways(response)) if ways is not None]
    if given:
        return given
    spans = _spans(response, from_end=True)
    if not spans:
        return [[[each]] for each in candidates(response)]
    listed = [spans[-1]]
    for before in reversed(spans[-_MOST_BOXES:-1]):
        joint = response[before.end : listed[0].begin] if before.end <= listed[0].begin else "no joint"
        if not (_JOINED.fullmatch(joint) and _OR.search(joint)):
            break
        listed.insert(0, before)
    return [_listed([span.text for span in listed], False)]


def _listed(parts: list[str], given_as_answer: bool) -> Ways:
    whole = [[Candidate(", ".join(parts), given_as_answer)]]
    return whole + [[Candidate(part, given_as_answer) for part in parts]] * (len(parts) > 1)


def _boxes(response: str) -> Ways | None:
    """Return the readings of the last box, or of the list that the last boxes form; None without a box, and no reading where the
    last box is not closed or is taken back."""
    if (last := _box(response, len(response))) is None:
        return None
    if not last.text or _TAKEN_BACK.match(response, last.end):
        return []
    listed = [last]
    while len(listed) < _MOST_BOXES and (before := _box(response, listed[0].begin)) and before.text:
        if not _JOINED.fullmatch(response, before.end, listed[0].begin):
            break
        listed.insert(0, before)
    return _listed([box.text for box in listed], True)


def _phrase_ways(response: str) -> Ways | None:
    said = _said(response)
    if not said:
        return None
    spans = _spans(said, from_end=False)
    if not spans or _TAKEN_BACK.match(said, spans[0].end):
        return [] if spans else [[Candidate(said, True)]]
    first, rest = spans[0].text, said[spans[0].end :]
    joint = _LISTS.match(rest)
    if not (joint and rest.strip("$ .")):
        return [[Candidate(first, True)]] + [[Candidate(said, True)]] * (said.strip("$") != first)
    parts = [first, *(stripped for part in _PARTED.split(rest) if (stripped := part.strip("$ .()\\")))]
    return [[Candidate(said, True)], [Candidate(part, True) for part in parts]]


@dataclass(frozen=True)
class _Span:
    begin: int
    end: int
    text: str


def last_boxed(text: str) -> str | None:
    """Return the content of the last ``\\boxed{...}`` or ``\\fbox{...}``, braces balanced; of ``\\boxed 5`` the text up to ``$``.

    None without a box or when the last one is not closed.
    """
    box = _box(text, len(text))
    return (box.text or None) if box else None


def _box(text: str, before: int) -> _Span | None:
    """The last box that begins before a place; its text is empty where it is not closed."""
    start = max(text.rfind("\\boxed", 0, before), text.rfind("\\fbox", 0, before))
    if start < 0:
        return None
    at = start + (len("\\boxed") if text.startswith("\\boxed", start) else len("\\fbox"))
    rest = text[at:before]
    if not rest.lstrip().startswith("{"):
        bare = re.split(r"[$\n]", rest, maxsplit=1)[0]
        return _Span(start, at + len(bare), bare.strip().rstrip("."))
    depth, begin = 0, rest.index("{")
    for brace in _BRACES.finditer(rest, begin):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return _Span(start, at + brace.end(), rest[begin + 1 : brace.start()].strip())
    return _Span(start, before, "")


def _phrase(response: str) -> list[str]:
    """Return the first formula behind the last "Final Answer: The final answer is", and the whole sentence where it has more."""
    said = _said(response)
    if not said:
        return []
    formulas = _formulas(said, from_end=False)
    return [*formulas[:1], said] if said.strip("$") not in formulas[:1] else formulas[:1]


def _said(response: str) -> str:
    """Return the text behind the last "Final Answer: The final answer is"."""
    found = None
    for found in _PHRASE.finditer(response):  # noqa: B007  the last one
        pass
    if found is None:
        return ""
    closing = _CLOSING.search(found["rest"])
    return (found["rest"][: closing.start()] if closing else found["rest"]).strip().rstrip(".").strip()


def _formulas(text: str, from_end: bool) -> list[str]:
    """The texts of :func:`_spans`."""
    return [span.text for span in _spans(text, from_end)]


def _spans(text: str, from_end: bool) -> list[_Span]:
    """What stands between dollars, in ``\\(...\\)`` and in ``\\[...\\]``, in the order in which they end; none that is empty.

    Args:
        from_end: dollars are paired from the end, so that a price early in a reply opens no formula; else from the start.
    """
    spans, opened, dollars = [], {}, []
    for mark in _MARKS.finditer(text):
        if mark[0].startswith("$"):
            dollars.append(mark)
        elif mark[0] in ("\\(", "\\["):
            opened.setdefault(mark[0], mark)
        elif (begin := opened.pop(_CLOSES.get(mark[0]), None)) is not None:
            spans.append(_Span(begin.start(), mark.end(), text[begin.end() : mark.start()].strip()))
    pairs = dollars[len(dollars) % 2 :] if from_end else dollars
    for left, right in zip(pairs[::2], pairs[1::2], strict=False):
        spans.append(_Span(left.start(), right.end(), text[left.end() : right.start()].strip()))
    return [span for span in sorted(spans, key=lambda span: (span.end, span.text)) if span.text]
