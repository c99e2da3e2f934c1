"""Preference tuning: raise a chosen response above a rejected one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tulu_mega.config.preference import PreferenceSettings
from tulu_mega.objectives.pairs import PreferenceLoss, Side, sides
from tulu_mega.records import LossOutput, PackedBatch, Reads


@dataclass(frozen=True)
class PreferenceObjective:
    """Mean over pairs of a loss, and of ``sft_weight`` times the chosen response's mean negative log-probability.

    The losses are in `objectives/preference/`; the added term is that of Pang et al., arXiv 2404.19733, equation 2.
    """

    loss: PreferenceLoss
    sft_weight: float = 0.0
    reads: ClassVar[Reads] = Reads.SEQUENCE_LOGP
    largest: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, settings: PreferenceSettings) -> PreferenceObjective:
        """What ``[preference]`` asks for."""
        return cls(settings.made_loss(), settings.sft_weight)

    @property
    def reported(self) -> tuple[str, ...]:
        """Means over pairs, and ``kl``, over responses, of losses that read a reference."""
        names = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp")
        return (*names, "kl") if self.loss.reads_reference else names

    def __call__(self, logp_S: Tensor, batch: PackedBatch) -> LossOutput:
        """
        Args:
            logp_S: float64, sum of the log-probabilities of each segment's trained tokens.
            batch: pairs; with the column ``ref_logp_S``, float64, the same of the reference, where the loss reads one.
        """
        gain_S = logp_S - batch.column("ref_logp_S") if self.loss.reads_reference else logp_S
        sums, gained, tokens = sides(batch, logp_S, gain_S, batch.trained_S)
        means, gains = ([side / count for side, count in zip(each, tokens, strict=True)] for each in (sums, gained))
        if not self.loss.of_means:
            gains = gained
        chosen, rejected = map(Side, gains, means)
        loss_P = self.loss(chosen, rejected) - self.sft_weight * chosen.mean_P

        pairs = len(loss_P)
        chosen_P, rejected_P = (self.loss.beta * gain.detach() for gain in gains)
        sums_P = {
            "accuracy": (chosen_P > rejected_P).sum(),
            "margin": (chosen_P - rejected_P).sum(),
            "chosen_reward": chosen_P.sum(),
            "rejected_reward": rejected_P.sum(),
            "chosen_logp": sums[0].detach().sum(),
            "rejected_logp": sums[1].detach().sum(),
        }
        metrics = {name: (value, pairs) for name, value in sums_P.items()}
        if self.loss.reads_reference:
            # log(reference / policy) of given responses, by response: KL(reference || policy) where they are the reference's own
            metrics["kl"] = (-sum(gain.detach().sum() for gain in gains), 2 * pairs)
        return LossOutput(loss_P.sum(), pairs, metrics)
