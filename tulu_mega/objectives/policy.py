"""Policy gradients from groups of sampled responses: GRPO and what has grown out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tulu_mega.config.rollout import PolicySettings
from tulu_mega.objectives import importance, kl
from tulu_mega.records import LossOutput, PackedBatch, TokenOutput


@dataclass(frozen=True)
class PolicyObjective:
    """Mean of ``-surrogate * weight + beta * divergence - entropy * H`` by token, with ``r = exp(logp - old_logp)``, A advantage:

    - ``grpo``, ``dapo``: the surrogate is ``min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` (PPO: Schulman et al., arXiv
      1707.06347, equation 7; GRPO: Shao et al., arXiv 2402.03300, equation 3; two bounds: DAPO, Yu et al., arXiv 2503.14476,
      section 3.1).
    - ``cispo``: ``clip(r, 1 - clip_low, 1 + clip_high) A logp``, the clipped ratio held constant (MiniMax, arXiv 2506.13585,
      section 3.1).
    - ``gspo``: as grpo, with one ratio a response, ``r = exp(mean of logp - old_logp over its tokens)`` (Zheng et al.,
      arXiv 2507.18071, section 4.1).

    ``weight`` corrects for the sampler (see `importance.weights`) and multiplies the surrogate alone; a token that it leaves out
    still counts in the mean. What the mean is over, ``aggregation``, is counted over the global mini-batch:

    - ``token``: all trained tokens (DAPO, section 3.3).
    - ``sequence``: responses, each the mean of its tokens (GRPO, equation 3).
    - ``constant``: responses, each the sum of its tokens over ``max_tokens`` (Liu et al., arXiv 2503.20783, Dr. GRPO).

    A response without trained tokens (cut off, with ``overlong = "mask"``) is in no sum and no count (DAPO, section 3.4).

    Without ``old_logp_T`` in the batch the policy itself is taken for the one before its update, r being 1: right when a batch is
    sampled from, and makes, one update only. All of it is computed in float64 of float32 log-probabilities: where they are
    the same bits r is exactly 1 and the divergence exactly 0.
    """

    loss: Literal["grpo", "dapo", "cispo", "gspo"]
    clip_low: float
    clip_high: float
    aggregation: Literal["token", "sequence", "constant"]
    max_tokens: int
    """what a response is divided by when the aggregation is ``constant``: the longest response that may be sampled"""
    beta: float = 0.0
    kl: Literal["k1", "k2", "k3"] = "k3"
    entropy: float = 0.0
    importance: Literal["none", "token", "sequence"] = "none"
    importance_cap: float = 2.0
    mask_above: float | None = None
    needs: ClassVar[str] = "token_logp+entropy"
    largest: ClassVar[tuple[str, ...]] = ("ratio_max", "sampler_difference_max")

    @classmethod
    def of(cls, settings: PolicySettings, max_tokens: int) -> PolicyObjective:
        """What ``[policy]`` asks for.

        Args:
            max_tokens: longest response, of ``[sampling]``.
        """
        names = (
            "loss", "clip_low", "clip_high", "aggregation", "beta", "kl", "entropy", "importance", "importance_cap", "mask_above",
        )  # fmt: skip
        return cls(max_tokens=max_tokens, **{name: getattr(settings, name) for name in names})

    @property
    def reported(self) -> tuple[str, ...]:
        """Means over trained tokens.

        ``ratio``; ``clip_low`` and ``clip_high``, the share whose gradient the lower and the upper bound took away (gspo: that
        lie in such responses; cispo: whose ratio they changed); ``entropy``; ``kl`` with ``beta``; ``sampler_difference``, of
        ``|old_logp - sampler_logp|``; ``importance_weight``, and the share of weights cut and left out.
        """
        names = ("ratio", "clip_low", "clip_high", "entropy", "sampler_difference")
        names += ("importance_weight", "importance_cut", "importance_left_out")
        return names + (("kl",) if self.beta else ())

    def __call__(self, output: TokenOutput, batch: PackedBatch) -> LossOutput:
        """
        Args:
            output: log-probabilities and entropies.
            batch: with ``advantages_T`` and ``sampler_logp_T``; ``ref_logp_T`` where ``beta`` is not 0; ``old_logp_T`` or None.
        """
        logp_T = output.values_T.double()
        old_logp_T = logp_T.detach() if batch.old_logp_T is None else batch.old_logp_T.double()
        sampler_logp_T, advantages_T = batch.sampler_logp_T.double(), batch.advantages_T.double()
        corrected = importance.weights(self.importance, old_logp_T, sampler_logp_T, self.importance_cap, self.mask_above, output)
        ratio_T = self._ratio(logp_T - old_logp_T, output)
        loss_T = -self._surrogate(ratio_T, advantages_T, logp_T) * corrected.weight_T
        metrics = {"ratio": ratio_T, "entropy": output.entropy_T} | self._clipped(ratio_T, advantages_T)
        if self.beta:
            metrics["kl"] = kl.divergence(self.kl, logp_T, batch.ref_logp_T.double())
            loss_T = loss_T + self.beta * metrics["kl"]
        if self.entropy:
            loss_T = loss_T - self.entropy * output.entropy_T
        difference_T = (old_logp_T - sampler_logp_T).abs()
        metrics |= {
            "sampler_difference": difference_T,
            "importance_weight": corrected.weight_T,
            "importance_cut": corrected.cut_T,
            "importance_left_out": corrected.left_out_T,
        }
        largest = {"ratio_max": ratio_T, "sampler_difference_max": difference_T}

        trained_T = batch.loss_mask_T
        tokens = int(trained_T.sum())
        loss_sum, count = self._aggregated(loss_T.masked_fill(~trained_T, 0.0), tokens, batch)
        return LossOutput(
            loss_sum,
            count,
            {name: (value_T.detach()[trained_T].double().sum(), tokens) for name, value_T in metrics.items()},
            {name: value_T.detach().masked_fill(~trained_T, 0.0).amax() for name, value_T in largest.items()},
        )

    def _ratio(self, log_ratio_T: Tensor, output: TokenOutput) -> Tensor:
        if self.loss == "gspo":
            batch = output.batch
            log_ratio_S = output.segment_sums(log_ratio_T) / batch.trained_S.clamp(min=1)
            log_ratio_T = log_ratio_S[batch.segments_T]
        return log_ratio_T.exp()

    def _surrogate(self, ratio_T: Tensor, advantages_T: Tensor, logp_T: Tensor) -> Tensor:
        clipped_T = ratio_T.clamp(1 - self.clip_low, 1 + self.clip_high)
        if self.loss == "cispo":
            return clipped_T.detach() * advantages_T * logp_T
        return torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)

    def _clipped(self, ratio_T: Tensor, advantages_T: Tensor) -> dict[str, Tensor]:
        low_T, high_T = ratio_T < 1 - self.clip_low, ratio_T > 1 + self.clip_high
        if self.loss == "cispo":
            return {"clip_low": low_T, "clip_high": high_T}
        return {"clip_low": low_T & (advantages_T < 0), "clip_high": high_T & (advantages_T > 0)}

    def _aggregated(self, loss_T: Tensor, tokens: int, batch: PackedBatch) -> tuple[Tensor, int]:
        """Sum and count of this rank's share; a count is an integer, so that lengths divide in the sum."""
        if self.aggregation == "token":
            return loss_T.sum(), tokens
        if self.aggregation == "constant":
            return loss_T.sum() / self.max_tokens, batch.num_trained_sequences
        return (loss_T / batch.trained_S.clamp(min=1)[batch.segments_T]).sum(), batch.num_trained_sequences
