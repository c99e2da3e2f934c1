"""Policy-gradient losses of packed responses: surrogate, clip, divergence, importance weights, aggregation and metrics.

    terms        what a loss is, what it is made of, what comes of it
    reference    the formulas in torch, through autograd: the CPU's path, and the oracle of
    kernel       loss, metrics and gradient in one pass over the tokens, with Triton
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from tulu_kernels.dispatch import Backend, chosen
from tulu_kernels.policy_loss.reference import losses
from tulu_kernels.policy_loss.terms import LARGEST, SUMS, Outcome, PolicyLoss, Tokens
from tulu_kernels.segment_sums import segment_sums

__all__ = ["LARGEST", "SUMS", "Outcome", "PolicyLoss", "Tokens", "policy_loss"]


def policy_loss(
    how: PolicyLoss, tokens: Tokens, over_ranks: Callable[[Tensor], Tensor] = lambda share_S: share_S, backend: Backend = "auto"
) -> Outcome:
    """The loss of a pack's tokens on this rank, its metrics, and, when it is differentiated, its gradient.

    Args:
        how: which loss.
        tokens: of this rank.
        over_ranks: adds float64 [S] up over the ranks that share the pack's responses, forward and backward. Called once for gspo
            and once for weights by response.
        backend: see `dispatch.chosen`.
    """
    triton = chosen("policy_loss", tokens.logp_T.device, backend) == "triton"
    if not triton:  # so that autograd adds the gradients of ratio and token up in float64
        tokens = replace(tokens, logp_T=tokens.logp_T.double())
    old_logp_T = tokens.logp_T.detach() if tokens.old_logp_T is None else tokens.old_logp_T

    def whole(values_T: Tensor, minus_T: Tensor) -> Tensor:
        sums_S = segment_sums(values_T, tokens.segments_T, len(tokens.trained_S), minus_T=minus_T, backend=backend)
        return over_ranks(sums_S)

    log_weight_S = whole(old_logp_T, tokens.sampler_logp_T) if how.importance == "sequence" else None
    log_ratio_S = whole(tokens.logp_T, old_logp_T) if how.loss == "gspo" else None
    if not triton:
        return losses(how, tokens, log_ratio_S, log_weight_S)
    from tulu_kernels.policy_loss import kernel

    return kernel.losses(how, tokens, log_ratio_S, log_weight_S)
