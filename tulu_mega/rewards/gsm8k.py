"""The last number of a reply, as published and as one would have it."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from tulu_mega.rewards.verdict import Messages, Verdict

_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_PUBLISHED_THOUSANDS = re.compile(r"(\d),(\d)")  # takes both digits: of "1,2,3" only the first comma goes
_PUBLISHED = re.compile(r"[-+]?\d*\.\d+|\d+")  # a decimal keeps its sign, an integer does not
# A minus that follows a value or a bracket is a subtraction, not a sign; so it is behind a dollar that closes such a formula, but
# not behind one that opens one. Chinese, Japanese and Korean are written without spaces: a word of theirs is no value.
_VALUE = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]|[.)\]}%]"
_SIGN = rf"(?<!{_VALUE})(?<!(?:{_VALUE})\$)(?<!(?:{_VALUE})\$\$)[-+](?:\\?\$)?"
# "1.5.2" has no number at its inner point.
_SIGNED = re.compile(rf"(?:{_SIGN})?(?<![\d.])(?:\d+(?:\.\d+)?|\.\d+)")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)")


def _number(ground_truth: Any) -> str:
    """The ground truth as text without thousands' commas.

    Raises:
        ValueError: it is no number.
    """
    if isinstance(ground_truth, (int, float)) and not isinstance(ground_truth, bool):
        ground_truth = str(ground_truth)
    if not isinstance(ground_truth, str):
        raise ValueError(f"expected the answer as a number, got {type(ground_truth).__name__}")
    number = _THOUSANDS.sub("", ground_truth.strip())
    if not _NUMBER.fullmatch(number):
        hint = ": give what follows '####' alone" if "####" in ground_truth else ""
        raise ValueError(f"expected the answer as a number alone, such as '1200', got {ground_truth[:80]!r}{hint}")
    return number


class Gsm8k:
    """The last number of the reply, commas between digits stripped, equal to the ground truth character by character.

    Follows Tulu 3's code of November 2024 (the later code is the same): an integer is read without its sign, so that
    "-7" answers 7 and a ground truth of -7 is never met; "7.0" is not "7"; "1.5.2" ends in ".2"; of "1,2,3" the
    last number is 3, of "1,2" it is 12; a reply without a number is wrong.

    Departs in two things. Commas of the ground truth are stripped as well, for no reply could meet them. The whole reply
    is read, where the published code cut it at a tag ``<|assistant|>`` of the prompt.
    """

    def check(self, ground_truth: Any) -> None:
        _number(ground_truth)

    def __call__(self, response: str, ground_truth: Any, *, messages: Messages | None = None) -> Verdict:
        text = _PUBLISHED_THOUSANDS.sub(r"\1\2", response)
        expected, numbers = _number(ground_truth), _PUBLISHED.findall(text)
        if not numbers:
            return Verdict.of(False, f"no number, expected {expected}")
        return Verdict.of(numbers[-1] == expected, f"last number {numbers[-1]}, expected {expected}")


class LastNumber:
    """The last number of the reply, sign included, equal in value to the ground truth: "-7.0" meets -7.

    Follows nothing published: it is ``gsm8k`` without its quirks, for data with negative or decimal answers. A typographic
    minus counts as one, and dollars may stand before the sign or behind it: "$-7$", "-$7".
    """

    def check(self, ground_truth: Any) -> None:
        _number(ground_truth)

    def __call__(self, response: str, ground_truth: Any, *, messages: Messages | None = None) -> Verdict:
        text = _THOUSANDS.sub("", response.replace("\N{MINUS SIGN}", "-"))
        expected, numbers = _number(ground_truth), [re.sub(r"[\\$]", "", found) for found in _SIGNED.findall(text)]
        if not numbers:
            return Verdict.of(False, f"no number, expected {expected}")
        return Verdict.of(Decimal(numbers[-1]) == Decimal(expected), f"last number {numbers[-1]}, expected {expected}")
