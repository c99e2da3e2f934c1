"""IPO: Azar et al., arXiv 2310.12036."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tulu_mega.objectives.pairs import Side

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Squared distance of the means' difference from 1/(2 beta).

    ``(d - 1/(2 beta))^2`` with ``d = (lc - lc_ref) - (lr - lr_ref)`` (equation 17), l the mean of a response's log-probabilities,
    as TRL has it.
    """

    beta: float = 0.1
    of_means: ClassVar[bool] = True
    reads_reference: ClassVar[bool] = True

    def __call__(self, chosen: Side, rejected: Side) -> Tensor:
        return (chosen.gain_P - rejected.gain_P - 1 / (2 * self.beta)) ** 2

    def at_reference(self) -> float:
        return 1 / (2 * self.beta) ** 2

    def tolerance(self, difference: float) -> float:
        return difference / self.beta + difference**2  # (d - c)^2 - c^2 = d^2 - 2 c d with c = 1/(2 beta)
