"""Verifiable instructions as they were judged when Tulu 3 was trained."""

from __future__ import annotations

from tulu_mega.rewards.constraints import NOVEMBER_2024
from tulu_mega.rewards.verifiers.ifeval import IfEval


class IfEval2024(IfEval):
    """The same as it was when Tulu 3 was trained (November 2024), errors included: for reproducing that run.

    The whole reply is judged, white space around it dropped. Placeholders are always met; a choice is met when the reply
    occurs in an option, so that an empty one always is; "around N" words of capitals means exactly N; ``!`` ends no
    sentence. Empty replies can meet constraints. Departs where the published code crashes, as :class:`IfEval` does.
    """

    functions = NOVEMBER_2024

    def judged(self, response: str) -> str | None:
        return response.strip()


VERIFIER = IfEval2024
