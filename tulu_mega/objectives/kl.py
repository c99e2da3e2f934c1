"""Estimates of the divergence between the policy and a reference, of the tokens that the policy drew."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def divergence(kind: Literal["k1", "k2", "k3"], logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    """Estimates of KL(policy || reference) by token, exactly 0 where both give the same probability.

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
