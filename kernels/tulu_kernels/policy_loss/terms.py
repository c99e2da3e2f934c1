"""What a policy loss is, what it is made of, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tulu_kernels.policy_choices import Aggregation, Divergence, Importance, Surrogate

SUMS = (
    "loss", "ratio", "clip_low", "clip_high", "entropy", "sampler_difference", "importance_weight", "importance_cut",
    "importance_left_out", "kl", "tokens",
)  # fmt: skip
"""Sums over trained tokens; all but the loss, which is what the aggregation makes of it, are metrics."""
LARGEST = ("ratio_max", "sampler_difference_max")
"""Largest values of trained tokens, at least 0."""


@dataclass(frozen=True)
class PolicyLoss:
    """Mean of ``-surrogate * weight + beta * divergence - entropy * H`` by token, with ``r = exp(logp - old_logp)``, A advantage:

    - ``grpo``, ``dapo``: the surrogate is ``min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` (PPO: Schulman et al., arXiv
      1707.06347, equation 7; GRPO: Shao et al., arXiv 2402.03300, equation 3; two bounds: DAPO, Yu et al., arXiv 2503.14476,
      section 3.1).
    - ``cispo``: ``clip(r, 1 - clip_low, 1 + clip_high) A logp``, the clipped ratio held constant (MiniMax, arXiv 2506.13585,
      section 3.1).
    - ``gspo``: as grpo, with one ratio a response, ``r = exp(mean of logp - old_logp over its tokens)`` (Zheng et al.,
      arXiv 2507.18071, section 4.1).

    ``weight`` corrects for the sampler (see `reference.importance_weights`) and multiplies the surrogate alone; a token that it
    leaves out still counts in the mean. The divergence is one of `reference.divergence`. What the mean is over, ``aggregation``,
    is counted over the global mini-batch:

    - ``token``: all trained tokens (DAPO, section 3.3).
    - ``sequence``: responses, each the mean of its tokens (GRPO, equation 3).
    - ``constant``: responses, each the sum of its tokens over ``max_tokens`` (Liu et al., arXiv 2503.20783, Dr. GRPO).

    A response without trained tokens (cut off, with ``overlong = "mask"``) is in no sum and no count (DAPO, section 3.4).

    Without old log-probabilities the policy itself is taken for the one before its update, r being 1: right when a batch is
    sampled from, and makes, one update only. All of it is computed in float64 of float32 log-probabilities: where they are
    the same bits r is exactly 1 and the divergence exactly 0.
    """

    loss: Surrogate
    clip_low: float
    clip_high: float
    aggregation: Aggregation
    max_tokens: int
    """what a response is divided by when the aggregation is ``constant``: the longest response that may be sampled"""
    beta: float = 0.0
    kl: Divergence = "k3"
    entropy: float = 0.0
    importance: Importance = "none"
    importance_cap: float = 2.0
    mask_above: float | None = None


@dataclass(frozen=True)
class Tokens:
    """A rank's tokens of a pack, [T]; the numbers are float32 where nothing else is said."""

    logp_T: Tensor
    """log-probabilities by the policy; may be differentiated"""
    entropy_T: Tensor
    """of the policy's distributions; may be differentiated"""
    sampler_logp_T: Tensor
    advantages_T: Tensor
    trained_T: Tensor
    """bool; log-probabilities of other tokens are 0 and have no part in anything"""
    segments_T: Tensor
    """int64, ascending: the response that a token is of"""
    trained_S: Tensor
    """int64 [S], trained tokens of each response, those on other ranks too"""
    old_logp_T: Tensor | None = None
    ref_logp_T: Tensor | None = None
    """read where beta is not 0"""


@dataclass(frozen=True)
class Outcome:
    """Of these tokens; everything is on their device and nothing has waited for it."""

    loss_sum: Tensor
    """float64 scalar, differentiable: what the mean's count divides"""
    sums: dict[str, Tensor]
    """float64 scalars, named as in `SUMS`, ``kl`` where beta is not 0"""
    largest: dict[str, Tensor]
    """float64 scalars, named as in `LARGEST`"""
