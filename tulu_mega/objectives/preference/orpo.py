"""ORPO: Hong et al., arXiv 2403.07691."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tulu_mega.objectives.pairs import Side, logistic_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Supervised loss on the chosen response and the log-odds ratio of the two, without a reference model.

    ``-lc - beta log sigmoid(log(odds_c / odds_r))``, ``odds = p / (1 - p)`` and ``p = exp(l)`` (equations 4, 6 and 7), l the mean
    of a response's log-probabilities and beta the paper's lambda. The first term is over the response's tokens, as in the paper;
    TRL takes the prompt's too.
    """

    beta: float = 0.1
    of_means: ClassVar[bool] = True
    reads_reference: ClassVar[bool] = False

    def __call__(self, chosen: Side, rejected: Side) -> Tensor:
        return self.beta * logistic_loss(_log_odds(chosen.gain_P) - _log_odds(rejected.gain_P)) - chosen.mean_P


def _log_odds(logp_P: Tensor) -> Tensor:
    """``log(p / (1 - p))``, [P]."""
    import torch

    # a float32 log-probability may be 0, of which the odds would be infinite
    logp_P = logp_P.clamp(max=-torch.finfo(logp_P.dtype).eps)
    return logp_P - torch.log(-torch.expm1(logp_P))
