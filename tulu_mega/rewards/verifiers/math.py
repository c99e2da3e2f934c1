"""Answers of competition mathematics: found in the reply, compared as LaTeX and as expressions."""

from __future__ import annotations

import math
from collections.abc import Collection
from decimal import Decimal
from typing import Any

from tulu_mega.rewards.mathematics.equality import equivalent
from tulu_mega.rewards.mathematics.finding import Candidate, answers, candidates
from tulu_mega.rewards.mathematics.finished import finished
from tulu_mega.rewards.mathematics.latex import simpler
from tulu_mega.rewards.reasoning import answer_of
from tulu_mega.rewards.verdict import Messages, Verdict

_MARKS = (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


class MathAnswer:
    """The reply's answer is the ground truth's value, however it is written.

    Where the answer is looked for follows Tulu 3's code of November 2024: the last ``\\boxed`` and the first formula behind
    the last "Final Answer: The final answer is" are both candidates (and all that it says, for lists: ``$3$ and $4$``);
    without either, what stands between the last two dollars; without that, the whole reply. One candidate that is right
    suffices. A last box that is never closed (a truncated reply) gives no candidate.

    What counts as equal departs from it. The published code compared normalised LaTeX, then asked sympy whether the
    difference simplifies to 0; here it is normalised LaTeX, then numbers by their value, then math-verify, which also knows
    intervals, sets, matrices and equations: ``(1,2]`` is not ``(1,2)``, ``1,2`` is ``2,1``, ``x = 5`` is 5, ``x<-1`` or ``x>1``
    is a union of intervals. Decimals count as equal when six places and five significant digits agree; repeating ones
    (``0.\\overline{3}``) are fractions. Of a chain ``5 = 2+3`` the last value counts. A word of three letters or more is only
    ever equal to the same word.

    Words behind a value are dropped where they are a unit or a count (``5\\text{ cm}``, ``5 apples``); two different units are
    different, and what is part of the value counts: ``6\\text{ million}``, a.m. and p.m., ``\\mathrm{i}``, directions, "or
    more". A per cent sign is dropped, as published: ``4\\%`` meets 4, and ``400\\%`` does not. Of a ground truth from 0 to 1
    and of a fraction it is read: ``50\\%`` is 0.5. A ground truth of ``50\\%`` is met by 50, ``50\\%`` and 0.5.

    Reinforcement learning finds what pays without an answer, so two things that the published code takes are refused unless
    they are accepted by name (evaluation, which repeats published grading, accepts both):

    - ``unevaluated``: an answer that leaves to be calculated what was asked for: a sum, an integral, ``\\det``, ``\\max`` or
      ``3\\cdot 4`` where a numeral is expected (:func:`tulu_mega.rewards.mathematics.finished.finished`), a mere last formula
      that is no number itself, a formula of the prompt unless it is the ground truth as it is written.
    - ``several``: several answers: a box and a phrase that differ, a list of which one is right, an answer that is taken back
      (:func:`tulu_mega.rewards.mathematics.finding.answers`).

    Bases behind digits are compared too, which math-verify leaves out: ``1011_2`` is ``1011_{\\text{two}}``, not ``1011_3``.
    Where the ground truth has bases and the reply has none, the digits decide: the problem has named the base. A base where
    the ground truth has none is wrong, and so is the same value in another base.

    Other departures: reasoning is not read (:func:`tulu_mega.rewards.reasoning.answer_of`); the phrase counts whether its
    letters are capitals or not, and the last one rather than the first; a role tag of a transcript ends nothing; ``\\fbox``
    counts as ``\\boxed``; "I hope it is correct" need not follow the phrase; ``\\$`` is no dollar, ``$$`` is one, and a
    ``\\(...\\)`` or ``\\[...\\]`` counts that ends later; a reply is only compared whole when it is a single line without a box;
    what is longer than 400 characters is compared as text alone. A comparison of more than 5 s of CPU time, or of numbers
    with more than 10,000 digits, is no equality, as published: no reply can bring about an error.

    Args:
        accepts: "unevaluated" and "several" answers, as published.
    """

    def __init__(self, accepts: Collection[str] = ()) -> None:
        self._unevaluated, self._several = "unevaluated" in accepts, "several" in accepts
        equivalent("x+1", "2x/3")  # builds the LaTeX parser, which is no sample's time to pay for

    def check(self, ground_truth: Any) -> None:
        if type(ground_truth) is int or (isinstance(ground_truth, float) and math.isfinite(ground_truth)):
            return
        if not isinstance(ground_truth, str):
            raise ValueError(f"expected the answer as text (LaTeX) or a number, got {type(ground_truth).__name__}")
        if "\\boxed" in ground_truth:
            raise ValueError(f"expected what stands inside \\boxed{{...}} alone, got {ground_truth[:80]!r}")
        if not simpler(ground_truth):
            raise ValueError(f"expected the answer as text (LaTeX), got {ground_truth!r}, which is empty")

    def __call__(self, response: str, ground_truth: Any, *, messages: Messages | None = None) -> Verdict:
        expected, answer = _text(ground_truth), answer_of(response)
        question = "".join("".join(str(message.get("content")) for message in messages or ()).split())

        def right(candidate: Candidate) -> bool:
            return self._right(expected, candidate, question)

        found = candidates(answer)
        if self._several:
            places = [[[candidate] for candidate in found]]
        elif places := answers(answer):
            found = list({part.text: part for ways in places for way in ways for part in way}.values())
        said = " and ".join(repr(candidate.text[:80]) for candidate in found) or "no answer"
        if places and all(any(all(map(right, way)) for way in ways) for ways in places):
            return Verdict.of(True, f"answer {said} equals {expected!r}")
        return Verdict.of(False, f"found {said}, expected {expected!r}")

    def _right(self, expected: str, candidate: Candidate, question: str) -> bool:
        if not equivalent(expected, candidate.text, candidate.given_as_answer, self._unevaluated):
            return False
        if self._unevaluated:
            return True
        formula = "".join(candidate.text.split())
        restated = any(f"{left}{formula}{right}" in question for left, right in _MARKS)
        return finished(expected, candidate.text) and not (restated and simpler(candidate.text) != simpler(expected))


def _text(ground_truth: str | int | float) -> str:
    """A number as a decimal: 1e-07 is no LaTeX."""
    return ground_truth if isinstance(ground_truth, str) else f"{Decimal(str(ground_truth)):f}"


VERIFIER = MathAnswer
