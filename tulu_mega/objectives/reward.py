"""Reward modelling: a scalar for each response, higher for the chosen one of a pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from tulu_mega.objectives.pairs import sides
from tulu_mega.records import LossOutput, PackedBatch, Reads


@dataclass(frozen=True)
class RewardObjective:
    """Mean over pairs of ``-log sigmoid(r_chosen - r_rejected - margin)``.

    Bradley-Terry, as in Ouyang et al., arXiv 2203.02155, equation 1; the margin, 0 where the data gives none, as in Touvron et
    al., arXiv 2307.09288, equation 2.
    """

    reads: ClassVar[Reads] = Reads.SEQUENCE_SCORE
    reported: ClassVar[tuple[str, ...]] = ("accuracy", "margin", "chosen_reward", "rejected_reward")
    largest: ClassVar[tuple[str, ...]] = ()

    def __call__(self, score_S: Tensor, batch: PackedBatch) -> LossOutput:
        """
        Args:
            score_S: float64, the score at each segment's last trained token.
            batch: pairs; the column ``margin_S``, float64, by how much a chosen sequence is to be better than the one behind it,
                may be left out.
        """
        margin_S = batch.optional_column("margin_S")
        values_S = [score_S] if margin_S is None else [score_S, margin_S]
        (chosen_P, rejected_P), *margins = sides(batch, *values_S)
        difference_P = chosen_P - rejected_P
        asked_P = margins[0][0] if margins else 0.0
        loss = -F.logsigmoid(difference_P - asked_P).sum()
        pairs = len(difference_P)
        metrics = {
            "accuracy": (difference_P > 0).sum(),
            "margin": difference_P.detach().sum(),
            "chosen_reward": chosen_P.detach().sum(),
            "rejected_reward": rejected_P.detach().sum(),
        }
        return LossOutput(loss, pairs, {name: (value, pairs) for name, value in metrics.items()})
