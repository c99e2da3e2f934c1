"""Preference tuning: raise a chosen response above a rejected one, measured from a reference model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from tulu_mega.objectives.pairs import sides
from tulu_mega.records import LossOutput, PackedBatch


@dataclass(frozen=True)
class PreferenceObjective:
    """Mean over pairs of a loss of ``d = (lc - lc_ref) - (lr - lr_ref)``, c chosen, r rejected, by ``loss``:

    - ``dpo``: ``-log sigmoid(beta d)``, l the sum of a response's log-probabilities (Rafailov et al., arXiv 2305.18290,
      equation 7).
    - ``dpo_norm``: the same with l their mean per response token (Tulu 3, arXiv 2411.15124, section 5.1, equation 6).
    - ``ipo``: ``(d - 1/(2 beta))^2`` (Azar et al., arXiv 2310.12036, equation 17), l the mean, as TRL has it.
    - ``simpo``: ``-log sigmoid(beta d - gamma)`` without reference, l the mean (Meng et al., arXiv 2405.14734, equation 6).

    Label smoothing e takes ``(1 - e)`` of the loss of d and ``e`` of that of -d (conservative DPO; `gamma` keeps its sign, as in
    TRL). ``sft_weight`` adds the chosen response's mean negative log-probability (Pang et al., arXiv 2404.19733, equation 2).
    """

    loss: Literal["dpo_norm", "dpo", "ipo", "simpo"]
    beta: float
    label_smoothing: float = 0.0
    gamma_beta_ratio: float = 0.0
    sft_weight: float = 0.0
    needs: ClassVar[str] = "sequence_logp"
    reported: ClassVar[tuple[str, ...]] = (
        "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp", "kl",
    )  # fmt: skip
    largest: ClassVar[tuple[str, ...]] = ()

    def __call__(self, logp_S: Tensor, batch: PackedBatch) -> LossOutput:
        """
        Args:
            logp_S: float64, sum of the log-probabilities of each segment's trained tokens.
            batch: pairs; ``ref_logp_S`` the same of the reference, unless the loss is simpo.
        """
        gain_S = logp_S if self.loss == "simpo" else logp_S - batch.ref_logp_S
        sums, gained, tokens = sides(batch, logp_S, gain_S, batch.trained_S)
        means, gains = ([side / count for side, count in zip(each, tokens, strict=True)] for each in (sums, gained))
        if self.loss == "dpo":
            gains = gained
        loss_P = self._of_difference(gains[0] - gains[1]) - self.sft_weight * means[0]

        pairs = len(loss_P)
        chosen_P, rejected_P = (self.beta * gain.detach() for gain in gains)
        kl = 0.0 if self.loss == "simpo" else -sum(gain.detach().sum() for gain in gains)
        metrics = {
            "accuracy": (chosen_P > rejected_P).sum(),
            "margin": (chosen_P - rejected_P).sum(),
            "chosen_reward": chosen_P.sum(),
            "rejected_reward": rejected_P.sum(),
            "chosen_logp": sums[0].detach().sum(),
            "rejected_logp": sums[1].detach().sum(),
        }
        # log(reference / policy) of given responses, by response: KL(reference || policy) where they are the reference's own
        return LossOutput(
            loss_P.sum(), pairs, {name: (value, pairs) for name, value in metrics.items()} | {"kl": (kl, 2 * pairs)}
        )

    def at_reference(self) -> float:
        """The loss of any pair while the policy is the reference, without the SFT term; of simpo, which has none, NaN."""
        return {"dpo": math.log(2), "dpo_norm": math.log(2), "ipo": 1 / (2 * self.beta) ** 2}.get(self.loss, math.nan)

    def _of_difference(self, difference_P: Tensor) -> Tensor:
        if self.loss == "ipo":
            return (difference_P - 1 / (2 * self.beta)) ** 2
        logits_P = self.beta * difference_P
        if self.loss == "simpo":
            logits_P = logits_P - self.beta * self.gamma_beta_ratio
        return -(1 - self.label_smoothing) * F.logsigmoid(logits_P) - self.label_smoothing * F.logsigmoid(-logits_P)
