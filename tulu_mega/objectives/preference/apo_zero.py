"""APO-zero: D'Oosterlinck et al., arXiv 2408.06266."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tulu_mega.objectives.pairs import Side

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Raises the chosen response above the reference and lowers the rejected one, each by itself.

    ``1 - sigmoid(beta (lc - lc_ref)) + sigmoid(beta (lr - lr_ref))`` (equation 7, with TRL's constant), l the sum of a response's
    log-probabilities.
    """

    beta: float = 0.1
    of_means: ClassVar[bool] = False
    reads_reference: ClassVar[bool] = True

    def __call__(self, chosen: Side, rejected: Side) -> Tensor:
        return 1 - (self.beta * chosen.gain_P).sigmoid() + (self.beta * rejected.gain_P).sigmoid()

    def at_reference(self) -> float:
        return 1.0

    def tolerance(self, difference: float) -> float:
        return self.beta * difference / 4  # a sigmoid's slope is at most 1/4
