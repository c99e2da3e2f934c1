"""SimPO: Meng et al., arXiv 2405.14734."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tulu_mega.objectives.pairs import Side, logistic_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Mean log-probabilities, without a reference model.

    ``-log sigmoid(beta (lc - lr) - gamma)`` with ``gamma = beta gamma_beta_ratio`` (equation 6), l the mean of a response's
    log-probabilities. Label smoothing leaves gamma its sign, as in TRL.
    """

    beta: float = 2.0
    label_smoothing: float = 0.0
    gamma_beta_ratio: float = 0.3
    """by how much the mean log-probabilities are to differ"""
    of_means: ClassVar[bool] = True
    reads_reference: ClassVar[bool] = False

    def __call__(self, chosen: Side, rejected: Side) -> Tensor:
        logits_P = self.beta * (chosen.gain_P - rejected.gain_P) - self.beta * self.gamma_beta_ratio
        return logistic_loss(logits_P, self.label_smoothing)
