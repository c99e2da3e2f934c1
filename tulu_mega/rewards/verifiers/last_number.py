"""The last number of a reply, sign included."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from tulu_mega.rewards.reasoning import answer_of
from tulu_mega.rewards.verdict import Messages, Verdict
from tulu_mega.rewards.verifiers.gsm8k import THOUSANDS, number_of

# A minus that follows a value or a bracket is a subtraction, not a sign; so it is behind a dollar that closes such a formula, but
# not behind one that opens one. Chinese, Japanese and Korean are written without spaces: a word of theirs is no value.
_VALUE = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]|[.)\]}%]"
_SIGN = rf"(?<!{_VALUE})(?<!(?:{_VALUE})\$)(?<!(?:{_VALUE})\$\$)[-+](?:\\?\$)?"
# Other minus signs: a hyphen that breaks no line, figure and en dash, the mathematical, small and full-width ones.
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"))
# Thousands parted as LaTeX and typesetters do: 9{,}500, 9\\,500, 9\\ 500, thin and narrow spaces.
_GROUPS = re.compile(r"(?<=\d)(?:\{,\}|\\[,;:! ]|,\\!|[\u2009\u202f\u2008])(?=\d{3}(?!\d))")
# "1.5.2" has no number at its inner point.
_SIGNED = re.compile(rf"(?:{_SIGN})?(?<![\d.])(?:\d+(?:\.\d+)?|\.\d+)")


class LastNumber:
    """The last number of the reply, sign included, equal in value to the ground truth: "-7.0" meets -7.

    Follows nothing published: it is ``gsm8k`` without its quirks, for data with negative or decimal answers. A typographic
    minus or an en dash counts as one, and dollars may stand before the sign or behind it: "$-7$", "-$7". Thousands may be
    parted by LaTeX or by thin spaces: ``9{,}500``, ``9\\,500``. Reasoning is not read.
    """

    def check(self, ground_truth: Any) -> None:
        number_of(ground_truth)

    def __call__(self, response: str, ground_truth: Any, *, messages: Messages | None = None) -> Verdict:
        text = THOUSANDS.sub("", _GROUPS.sub("", answer_of(response).translate(_DASHES)))
        expected, numbers = number_of(ground_truth), [re.sub(r"[\\$]", "", found) for found in _SIGNED.findall(text)]
        if not numbers:
            return Verdict.of(False, f"no number, expected {expected}")
        return Verdict.of(Decimal(numbers[-1]) == Decimal(expected), f"last number {numbers[-1]}, expected {expected}")


VERIFIER = LastNumber
