"""Policy losses in torch, differentiated by autograd: the CPU's path, and the oracle of the kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tulu_kernels.policy_loss.terms import Outcome, PolicyLoss, Tokens


@dataclass(frozen=True)
class Weights:
    """Constants that multiply the surrogate, and what they are made of; [T], of trained tokens."""

    weight_T: Tensor
    """float64: the ratio cut at the cap, 0 where left out"""
    cut_T: Tensor
    """bool, where the ratio was above the cap"""
    left_out_T: Tensor
    """bool"""


def importance_weights(
    kind: Literal["none", "token", "sequence"], log_ratio_T: Tensor, cap: float, mask_above: float | None
) -> Weights:
    """Truncated importance weights: trainer's over sampler's probability, at most ``cap``, no gradient; 1 with ``none``.

    They correct for what sampler and trainer make of the same weights, as Yao et al., "Your efficient RL framework secretly
    brings you off-policy RL training" (2025), and TRL have it.

    Args:
        log_ratio_T: float64, log of the ratio of each token, or with ``sequence`` of the whole response that it is in (the
            product over its tokens).
        mask_above: ratios above it or below its inverse are left out: weight 0.
    """
    weight_T = log_ratio_T.clamp(max=math.log(cap)).exp() if kind != "none" else torch.ones_like(log_ratio_T)
    cut_T = log_ratio_T > math.log(cap) if kind != "none" else torch.zeros_like(log_ratio_T, dtype=torch.bool)
    left_out_T = log_ratio_T.abs() > (math.inf if mask_above is None else math.log(mask_above))
    return Weights(weight_T.masked_fill(left_out_T, 0.0), cut_T, left_out_T)


def divergence(kind: Literal["k1", "k2", "k3"], logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    """Estimates of KL(policy || reference) by token that the policy drew, exactly 0 where both give the same probability.

    With ``d = logp - ref_logp`` (Schulman, "Approximating KL divergence", joschu.net/blog/kl-approx.html):

    - ``k1``: ``d``. Unbiased, as a value; in a loss its gradient is 0 on average.
    - ``k2``: ``d^2 / 2``. Never negative; its gradient in a loss is that of the divergence on average.
    - ``k3``: ``exp(-d) + d - 1``. Never negative and unbiased; GRPO's (Shao et al., arXiv 2402.03300, equation 4).

    Args:
        logp_T, ref_logp_T: of the same tokens, float64.

    Returns:
        [T], differentiable in ``logp_T``.
    """
    difference_T = logp_T - ref_logp_T
    if kind == "k1":
        return difference_T
    if kind == "k2":
        return difference_T.square() / 2
    return (-difference_T).expm1() + difference_T


def losses(how: PolicyLoss, tokens: Tokens, log_ratio_S: Tensor | None, log_weight_S: Tensor | None) -> Outcome:
    """
    Args:
        log_ratio_S: of gspo, float64: sums of ``logp - old_logp`` over whole responses; may be differentiated.
        log_weight_S: of weights by response, float64: sums of ``old_logp - sampler_logp`` over them.
    """
    logp_T = tokens.logp_T.double()
    old_logp_T = logp_T.detach() if tokens.old_logp_T is None else tokens.old_logp_T.double()
    advantages_T, segments_T = tokens.advantages_T.double(), tokens.segments_T
    apart_T = old_logp_T - tokens.sampler_logp_T.double()
    corrected = importance_weights(
        how.importance, apart_T if log_weight_S is None else log_weight_S[segments_T], how.importance_cap, how.mask_above
    )
    lengths_S = tokens.trained_S.clamp(min=1)
    log_ratio_T = logp_T - old_logp_T if log_ratio_S is None else (log_ratio_S / lengths_S)[segments_T]
    ratio_T = log_ratio_T.exp()
    loss_T = -_surrogate(how, ratio_T, advantages_T, logp_T) * corrected.weight_T
    metrics = {
        "ratio": ratio_T,
        "entropy": tokens.entropy_T,
        "sampler_difference": apart_T.abs(),
        "importance_weight": corrected.weight_T,
        "importance_cut": corrected.cut_T,
        "importance_left_out": corrected.left_out_T,
        "tokens": tokens.trained_T,
    } | _clipped(how, ratio_T, advantages_T)
    if how.beta:
        metrics["kl"] = divergence(how.kl, logp_T, tokens.ref_logp_T.double())
        loss_T = loss_T + how.beta * metrics["kl"]
    if how.entropy:
        loss_T = loss_T - how.entropy * tokens.entropy_T.double()

    untrained_T = ~tokens.trained_T
    loss_T = loss_T.masked_fill(untrained_T, 0.0)
    if how.aggregation == "sequence":
        loss_T = loss_T / lengths_S[segments_T]
    loss_sum = loss_T.sum() / (how.max_tokens if how.aggregation == "constant" else 1)
    of_trained = {name: value_T.detach().double().masked_fill(untrained_T, 0.0) for name, value_T in metrics.items()}
    return Outcome(
        loss_sum,
        {name: value_T.sum() for name, value_T in of_trained.items()} | {"loss": loss_sum.detach()},
        {name + "_max": of_trained[name].amax() for name in ("ratio", "sampler_difference")},
    )


def _surrogate(how: PolicyLoss, ratio_T: Tensor, advantages_T: Tensor, logp_T: Tensor) -> Tensor:
    clipped_T = ratio_T.clamp(1 - how.clip_low, 1 + how.clip_high)
    if how.loss == "cispo":
        return clipped_T.detach() * advantages_T * logp_T
    return torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)


def _clipped(how: PolicyLoss, ratio_T: Tensor, advantages_T: Tensor) -> dict[str, Tensor]:
    """Where the lower and the upper bound took the gradient away; of cispo, where they changed the ratio."""
    low_T, high_T = ratio_T < 1 - how.clip_low, ratio_T > 1 + how.clip_high
    if how.loss == "cispo":
        return {"clip_low": low_T, "clip_high": high_T}
    return {"clip_low": low_T & (advantages_T < 0), "clip_high": high_T & (advantages_T > 0)}
