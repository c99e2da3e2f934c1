"""Where a reply gives its answer. Every scan reads the reply once: replies are long, and policies write anything."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PHRASE = re.compile(r"final answer\s*:\s*the final answer is(?P<rest>[^\n]*)", re.IGNORECASE)
_CLOSING = re.compile(r"I hope it is correct", re.IGNORECASE)
_MARKS = re.compile(r"\\\\|\\\$|\\[()\[\]]|\$\$?")  # backslashes in pairs and escaped dollars mark nothing
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_CLOSES = {"\\)": "\\(", "\\]": "\\["}


@dataclass(frozen=True)
class Candidate:
    """What may be the answer."""

    text: str
    given_as_answer: bool
    """boxed or behind the phrase; otherwise it is merely the last formula or the whole reply"""


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
    for brace in _BRACES.finditer(rest, begin):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return rest[begin + 1 : brace.start()].strip() or None
    return None


def _phrase(response: str) -> list[str]:
    """Of what the last "Final Answer: The final answer is" says, the first formula, and the whole where that is more."""
    found = None
    for found in _PHRASE.finditer(response):  # noqa: B007  the last one
        pass
    if found is None:
        return []
    closing = _CLOSING.search(found["rest"])
    said = (found["rest"][: closing.start()] if closing else found["rest"]).strip().rstrip(".").strip()
    formulas = _formulas(said, from_end=False)
    return [*formulas[:1], said] if said.strip("$") not in formulas[:1] else formulas[:1]


def _formulas(text: str, from_end: bool) -> list[str]:
    """What stands between dollars, in ``\\(...\\)`` and in ``\\[...\\]``, in the order in which they end; none that is empty.

    Args:
        from_end: dollars are paired from the end, so that a price early in a reply opens no formula; else from the start.
    """
    spans, opened, dollars = [], {}, []
    for mark in _MARKS.finditer(text):
        if mark[0].startswith("$"):
            dollars.append(mark)
        elif mark[0] in ("\\(", "\\["):
            opened.setdefault(mark[0], mark.end())
        elif (begin := opened.pop(_CLOSES.get(mark[0]), None)) is not None:
            spans.append((mark.end(), text[begin : mark.start()].strip()))
    pairs = dollars[len(dollars) % 2 :] if from_end else dollars
    for left, right in zip(pairs[::2], pairs[1::2], strict=False):
        spans.append((right.end(), text[left.end() : right.start()].strip()))
    return [formula for _, formula in sorted(spans) if formula]
