"""Corrections for what sampler and trainer make of the same weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tulu_mega.records import TokenOutput


@dataclass(frozen=True)
class Weights:
    """Constants that multiply the surrogate, and what they are made of; [T], of trained tokens."""

    weight_T: Tensor
    """float64: the ratio cut at the cap, 0 where left out"""
    cut_T: Tensor
    """bool, where the ratio was above the cap"""
    left_out_T: Tensor
    """bool"""


def weights(
    kind: Literal["none", "token", "sequence"],
    old_logp_T: Tensor,
    sampler_logp_T: Tensor,
    cap: float,
    mask_above: float | None,
    output: TokenOutput,
) -> Weights:
    """Truncated importance weights: trainer's over sampler's probability, at most ``cap``, no gradient.

    Of each token, or with ``sequence`` of the whole response (the product over its tokens, a segment of the pack); 1 with
    ``none``. As Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025), and TRL have it.

    Args:
        old_logp_T: the trainer's log-probabilities by the weights that the sampler had, float64.
        sampler_logp_T: the sampler's, of the distribution that it drew from, float64; both 0 where nothing is trained.
        mask_above: ratios above it or below its inverse are left out: weight 0. Of responses with ``sequence``, else of tokens.
        output: sums over segments.
    """
    log_ratio_T = (old_logp_T - sampler_logp_T).detach()
    if kind == "sequence":
        log_ratio_T = output.segment_sums(log_ratio_T)[output.batch.segments_T]
    weight_T = log_ratio_T.clamp(max=math.log(cap)).exp() if kind != "none" else torch.ones_like(log_ratio_T)
    cut_T = log_ratio_T > math.log(cap) if kind != "none" else torch.zeros_like(log_ratio_T, dtype=torch.bool)
    left_out_T = log_ratio_T.abs() > (math.inf if mask_above is None else math.log(mask_above))
    return Weights(weight_T.masked_fill(left_out_T, 0.0), cut_T, left_out_T)
