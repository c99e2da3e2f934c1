"""Length-normalised DPO: Tulu 3, arXiv 2411.15124, section 5.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tulu_mega.objectives.preference import dpo


@dataclass(frozen=True)
class Loss(dpo.Loss):
    """DPO on mean log-probabilities per response token (Tulu 3).

    As `dpo`, but l is the mean of a response's log-probabilities (equation 6).
    """

    beta: float = 5.0
    of_means: ClassVar[bool] = True
