"""Replies compared as text."""

from __future__ import annotations

import unicodedata
from typing import Any

from tulu_mega.rewards.reasoning import answer_of
from tulu_mega.rewards.verdict import Messages, Verdict, shortened


def _squeezed(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


class ExactMatch:
    """The whole reply, without its reasoning, equals the ground truth, or one of a list of them.

    Runs of white space count as one space, composed and decomposed accents as the same; case and punctuation count.
    Follows nothing published (Tulu's ``flan`` verifier drops case, punctuation and articles).
    """

    def check(self, ground_truth: Any) -> None:
        options = ground_truth if isinstance(ground_truth, list) else [ground_truth]
        if not options or not all(isinstance(option, str) and option.strip() for option in options):
            raise ValueError(f"expected a text or a list of texts, none of them empty, got {shortened(ground_truth)}")

    def __call__(self, response: str, ground_truth: Any, *, messages: Messages | None = None) -> Verdict:
        options = ground_truth if isinstance(ground_truth, list) else [ground_truth]
        found = _squeezed(answer_of(response))
        return Verdict.of(found in map(_squeezed, options), f"got {shortened(found)}, expected {shortened(ground_truth)}")


VERIFIER = ExactMatch
