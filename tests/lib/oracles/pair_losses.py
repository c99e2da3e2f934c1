"""Losses of a pair after TRL's formulas, for autograd in float64; test_trl_oracle.py holds them against TRL's trainers.

Read in TRL 1.16: trl/trainer/dpo_trainer.py (dpo, dpo_norm, ipo, apo_zero), trl/experimental/cpo/cpo_trainer.py (simpo) and
trl/experimental/orpo/orpo_trainer.py (orpo).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tulu_mega.config import PreferenceSettings


class Scored(NamedTuple):
    """A response: sum of its log-probabilities, its tokens, the reference's sum."""

    logp: Tensor
    tokens: int
    ref: float

    @property
    def mean(self) -> Tensor:
        return self.logp / self.tokens

    @property
    def gain(self) -> Tensor:
        return self.logp - self.ref


def pair_loss(settings: PreferenceSettings, chosen: Scored, rejected: Scored) -> Tensor:
    """The loss of one pair by what `[preference]` says."""
    return FORMULAS[settings.loss](settings, chosen, rejected) - settings.sft_weight * chosen.mean


def _sigmoid(z: Tensor, smoothing: float) -> Tensor:
    return -F.logsigmoid(z) * (1 - smoothing) - F.logsigmoid(-z) * smoothing


def dpo(given: PreferenceSettings, chosen: Scored, rejected: Scored) -> Tensor:
    return _sigmoid(given.beta * (chosen.gain - rejected.gain), given.label_smoothing)


def dpo_norm(given: PreferenceSettings, chosen: Scored, rejected: Scored) -> Tensor:
    return _sigmoid(given.beta * (chosen.gain / chosen.tokens - rejected.gain / rejected.tokens), given.label_smoothing)


def ipo(given: PreferenceSettings, chosen: Scored, rejected: Scored) -> Tensor:
    return (chosen.gain / chosen.tokens - rejected.gain / rejected.tokens - 1 / (2 * given.beta)) ** 2


def simpo(given: PreferenceSettings, chosen: Scored, rejected: Scored) -> Tensor:
    logits = chosen.mean - rejected.mean - given.gamma_beta_ratio
    return _sigmoid(given.beta * logits, given.label_smoothing)


def orpo(given: PreferenceSettings, chosen: Scored, rejected: Scored) -> Tensor:
    log_odds = (chosen.mean - rejected.mean) - (torch.log1p(-chosen.mean.exp()) - torch.log1p(-rejected.mean.exp()))
    return -chosen.mean - given.beta * F.logsigmoid(log_odds)


def apo_zero(given: PreferenceSettings, chosen: Scored, rejected: Scored) -> Tensor:
    losses_chosen = 1 - F.sigmoid(given.beta * chosen.gain)
    losses_rejected = F.sigmoid(given.beta * rejected.gain)
    return losses_chosen + losses_rejected


FORMULAS = {formula.__name__: formula for formula in (dpo, dpo_norm, ipo, simpo, orpo, apo_zero)}
