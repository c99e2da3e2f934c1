"""UltraFeedback as it was rated: an instruction, and completions each with its scores, of which a row gives one pair."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from tulu_mega.data.messages import short


class Useless(Exception):
    """Raised for a well-formed row from which nothing can be learned; the text is the reason."""


def pair_of(instruction: Any, completions: Any) -> tuple[str, str]:
    """The better and the worse response.

    The better is the one of the highest score, the first of several. The worse is one of those that score less; the instruction's
    text picks one as if by lot, since always taking the worst would make pairs too easy.

    Raises:
        ValueError: a column of another form.
        Useless: all score the same.
    """
    if not isinstance(instruction, str):
        raise ValueError(f"instruction is {short(instruction)}; expected text")
    if not isinstance(completions, list) or not all(isinstance(one, dict) for one in completions):
        raise ValueError(f"completions is {short(completions)}; expected a list of objects with response and scores")
    if len(completions) < 2:
        raise ValueError(f"has {len(completions)} completions; expected at least two to choose from")
    for number, one in enumerate(completions, 1):
        if not isinstance(one.get("response"), str):
            raise ValueError(f"completion {number} has the response {short(one.get('response'))}; expected text")
    scores = _scores(completions)
    best = max(range(len(scores)), key=lambda at: (scores[at], -at))
    less = [at for at, score in enumerate(scores) if score < scores[best]]
    if not less:
        raise Useless(f"all {len(scores)} completions have the same score, {scores[best]:g}")
    drawn = int.from_bytes(hashlib.sha256(instruction.encode("utf-8", "surrogatepass")).digest()[:8], "big") % len(less)
    return completions[best]["response"], completions[less[drawn]]["response"]


def _scores(completions: list[dict[str, Any]]) -> list[float]:
    """By the first measure that all of them have: the mean of the aspects' ratings, `fine-grained_score`, `overall_score`,
    `rating`, `score`.

    Ratings come first: the data set's first version has 2,628 overall scores of 10, many of which were to be 1.
    """
    measures = [_ratings, *(lambda one, name=name: _number(one.get(name)) for name in _NAMES)]
    for measure in measures:
        found = [measure(one) for one in completions]
        if None not in found:
            return found
    raise ValueError(f"its completions do not all have annotations with ratings, or one of {', '.join(_NAMES)}, each a number")


_NAMES = ("fine-grained_score", "overall_score", "rating", "score")


def _ratings(completion: dict[str, Any]) -> float | None:
    annotations = completion.get("annotations")
    if not isinstance(annotations, dict):
        return None
    given = [aspect.get("Rating", aspect.get("rating")) for aspect in annotations.values() if isinstance(aspect, dict)]
    numbers = [number for value in given if (number := _number(value)) is not None]  # some aspects are not rated: "N/A"
    return sum(numbers) / len(numbers) if numbers else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
