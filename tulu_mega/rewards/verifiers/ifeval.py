"""Verifiable instructions: one constraint a row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tulu_mega.rewards.constraints import CONSTRAINTS, Function, read_constraint
from tulu_mega.rewards.reasoning import answer_of
from tulu_mega.rewards.verdict import Messages, Verdict
from tulu_mega.rewards.visible import is_visible

_ANSWER_TAGS = re.compile(r"</?answer>")


class IfEval:
    """Whether the reply meets the constraint of the ground truth; 1 or 0.

    Follows open-instruct's mended verifier (2026): what stands before the last ``</think>`` is not judged, tags ``<answer>`` and
    ``</answer>`` and the white space around are dropped, and the four functions with errors are right. Departs where
    that one crashes (an index beyond the paragraphs, a reply in no language: not met), for reasoning that is never closed and
    for empty replies (also of characters that cannot be seen), which meet nothing, as in IFEval itself (arXiv 2311.07911):
    silence must not earn "all lowercase".
    """

    functions: Mapping[str, Function] = CONSTRAINTS

    def check(self, ground_truth: Any) -> None:
        read_constraint(ground_truth)

    def __call__(self, response: str, ground_truth: Any, *, messages: Messages | None = None) -> Verdict:
        constraint = read_constraint(ground_truth)
        text = self.judged(response)
        if text is None:
            return Verdict.of(False, f"empty reply, asked for {constraint.name}")
        met = constraint.met_by(text, self.functions)
        arguments = ", ".join(f"{name}={value!r}"[:80] for name, value in constraint.arguments.items())
        return Verdict.of(met, f"{constraint.name}({arguments}) is {'met' if met else 'not met'}")

    def judged(self, response: str) -> str | None:
        """The part of the reply that counts; None when there is none."""
        text = _ANSWER_TAGS.sub("", answer_of(response)).strip()
        return text if is_visible(text) else None


VERIFIER = IfEval
