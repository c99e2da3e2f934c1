"""Policy gradients from groups of sampled responses: GRPO and what has grown out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tulu_kernels.policy_loss import LARGEST, PolicyLoss, Tokens, policy_loss

from tulu_mega.config.rollout import PolicyLossSettings, PolicySettings
from tulu_mega.records import LossOutput, PackedBatch, Reads, TokenOutput


@dataclass(frozen=True)
class PolicyObjective(PolicyLoss):
    """A policy loss as the engine minimises it; `PolicyLoss` says what it is and `tulu_kernels.policy_loss` computes it."""

    reads: ClassVar[Reads] = Reads.TOKENS_WITH_ENTROPY
    largest: ClassVar[tuple[str, ...]] = LARGEST

    @classmethod
    def of(cls, settings: PolicySettings, max_tokens: int) -> PolicyObjective:
        """What ``[policy]`` asks for, the divergence from the reference in the loss.

        Args:
            max_tokens: longest response, of ``[sampling]``.
        """
        return cls._of(settings, max_tokens, beta=settings.beta, kl=settings.kl)

    @classmethod
    def without_divergence(cls, settings: PolicyLossSettings, max_tokens: int) -> PolicyObjective:
        """The same where the divergence is part of the rewards.

        Args:
            max_tokens: as for :meth:`of`.
        """
        return cls._of(settings, max_tokens, beta=0.0)

    @classmethod
    def _of(cls, settings: PolicyLossSettings, max_tokens: int, **divergence: Any) -> PolicyObjective:
        return cls(
            max_tokens=max_tokens,
            loss=settings.loss,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            aggregation=settings.aggregation,
            entropy=settings.entropy,
            importance=settings.importance,
            importance_cap=settings.importance_cap,
            mask_above=settings.mask_above,
            **divergence,
        )

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
        """Loss and metrics of a micro-batch, left on its device: nothing waits for them.

        Args:
            output: log-probabilities and entropies.
            batch: with columns of float32, 0 where nothing is trained: ``advantages_T``, of the label; ``sampler_logp_T``,
                log-probability of the label where it was sampled; ``old_logp_T``, the same by the weights that the rollouts were
                sampled with, on this trainer, taken for the policy's own where it is not there; ``ref_logp_T``, the same by the
                frozen reference, where ``beta`` is not 0.
        """
        given = Tokens(
            logp_T=output.values_T,
            entropy_T=output.entropy_T,
            sampler_logp_T=batch.column("sampler_logp_T"),
            advantages_T=batch.column("advantages_T"),
            trained_T=batch.loss_mask_T,
            segments_T=batch.segments_T,
            trained_S=batch.trained_S,
            old_logp_T=batch.optional_column("old_logp_T"),
            ref_logp_T=batch.column("ref_logp_T") if self.beta else None,
        )
        out = policy_loss(self, given, output.over_context, output.kernels)
        tokens = out.sums["tokens"]
        count = tokens if self.aggregation == "token" else batch.num_trained_sequences
        return LossOutput(out.loss_sum, count, {name: (out.sums[name], tokens) for name in self.reported}, out.largest)
