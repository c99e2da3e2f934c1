"""DPO: Rafailov et al., arXiv 2305.18290."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tulu_mega.objectives.pairs import Side, logistic_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """DPO on the sums of the responses' log-probabilities.

    ``-log sigmoid(beta d)`` with ``d = (lc - lc_ref) - (lr - lr_ref)``, c chosen, r rejected (equation 7).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    """conservative DPO: ``(1 - e)`` of the loss of d and ``e`` of that of -d"""
    of_means: ClassVar[bool] = False
    reads_reference: ClassVar[bool] = True

    def __call__(self, chosen: Side, rejected: Side) -> Tensor:
        return logistic_loss(self.beta * (chosen.gain_P - rejected.gain_P), self.label_smoothing)

    def at_reference(self) -> float:
        return math.log(2)

    def tolerance(self, difference: float) -> float:
        return self.beta * difference  # the slope is beta / 2 at 0 and at most beta anywhere
