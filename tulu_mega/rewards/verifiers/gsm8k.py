"""The last number of a reply, as Tulu 3 read it."""

from __future__ import annotations

import re
from typing import Any

from tulu_mega.rewards.reasoning import answer_of
from tulu_mega.rewards.verdict import Messages, Verdict

THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
"""commas between digits"""
_PUBLISHED_THOUSANDS = re.compile(r"(\d),(\d)")  # takes both digits: of "1,2,3" only the first comma goes
_PUBLISHED = re.compile(r"[-+]?\d*\.\d+|\d+")  # a decimal keeps its sign, an integer does not
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)")


def number_of(ground_truth: Any) -> str:
    """The ground truth as text without thousands' commas.

    Raises:
        ValueError: it is no number.
    """
    if isinstance(ground_truth, (int, float)) and not isinstance(ground_truth, bool):
        ground_truth = str(ground_truth)
    if not isinstance(ground_truth, str):
        raise ValueError(f"expected the answer as a number, got {type(ground_truth).__name__}")
    number = THOUSANDS.sub("", ground_truth.strip())
    if not _NUMBER.fullmatch(number):
        hint = ": give what follows '####' alone" if "####" in ground_truth else ""
        raise ValueError(f"expected the answer as a number alone, such as '1200', got {ground_truth[:80]!r}{hint}")
    return number


class Gsm8k:
    """The last number of the reply, commas between digits stripped, equal to the ground truth character by character.

    Follows Tulu 3's code of November 2024: an integer is read without its sign, so that "-7" answers 7 and a ground truth of
    -7 is never met; "7.0" is not "7"; "1.5.2" ends in ".2"; of "1,2,3" the last number is 3, of "1,2" it is 12; a reply
    without a number is wrong. The later code (open-instruct in August 2026) reads the sign of an integer too, so that "-7"
    answers -7 there and "12-5" ends in -5.

    Departs in four things. Reasoning is not read (:func:`tulu_mega.rewards.reasoning.answer_of`). Commas and white space around
    the ground truth are stripped as well, for no reply could meet them; a ground truth that is no number is refused before
    the run. The whole answer is read, where the published code cut a transcript at its tag ``<|assistant|>``.
    """

    def check(self, ground_truth: Any) -> None:
        number_of(ground_truth)

    def __call__(self, response: str, ground_truth: Any, *, messages: Messages | None = None) -> Verdict:
        text = _PUBLISHED_THOUSANDS.sub(r"\1\2", answer_of(response))
        expected, numbers = number_of(ground_truth), _PUBLISHED.findall(text)
        if not numbers:
            return Verdict.of(False, f"no number, expected {expected}")
        return Verdict.of(numbers[-1] == expected, f"last number {numbers[-1]}, expected {expected}")


VERIFIER = Gsm8k
