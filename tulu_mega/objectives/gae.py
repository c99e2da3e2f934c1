"""Advantages of single tokens by a value model: rewards of tokens and generalised advantage estimation (PPO).

A response of n trained tokens has n actions, in order, and before each of them a state that the value model gives a value. Where
the policy ended the response there is one state more, behind the last token: the score is given there, and the value model, a
reward model when training begins, was trained there. Where the response's room ran out there is none, and the score comes with
the last token.

Tokens that were given rather than sampled, as a tool's output is, are no actions and have no states: the state behind an answer
is the one before the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Discounts:
    """How far a reward reaches back.

    Raises:
        ValueError: a factor is not within [0, 1].
    """

    gamma: float = 1.0
    """discount of a later reward, a token"""
    lam: float = 0.95
    """lambda of the policy's advantages"""
    value_lam: float | None = None
    """lambda of the returns that the value model learns; `lam` when None (VAPO, arXiv 2504.05118, section 4.1: 1)"""
    adaptive: float | None = None
    """alpha of ``1 - 1 / (alpha * n)``, taken in the place of `lam` for a response of n tokens (VAPO, section 4.2), at least 0"""

    def __post_init__(self) -> None:
        for name, value in {"gamma": self.gamma, "lam": self.lam, "value_lam": self.value_lam}.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} = {value:g}: expected a factor from 0 to 1")
        if self.adaptive is not None and self.adaptive <= 0:
            raise ValueError(f"adaptive = {self.adaptive:g}: expected a factor above 0")

    def of_policy(self, tokens: int) -> float:
        """Lambda of a response's advantages."""
        return self.lam if self.adaptive is None else max(0.0, 1 - 1 / (self.adaptive * tokens))

    @property
    def of_value(self) -> float:
        """Lambda of a response's returns."""
        return self.lam if self.value_lam is None else self.value_lam


@dataclass(frozen=True)
class TokenEstimates:
    """What a response's tokens are worth, float64."""

    advantages: np.ndarray
    """[n], of the actions, not whitened"""
    returns: np.ndarray
    """[n + 1], or [n] where room ran out: of the states, what the value model is to give"""
    penalty: float
    """the part of the rewards that is the divergence from the reference, summed over the response"""


def token_rewards(score: float, logp: np.ndarray, ref_logp: np.ndarray | None, beta: float, states: int) -> np.ndarray:
    """The reward in each state, float64 [states]: ``-beta (logp - ref_logp)`` of its action, and the score in the last.

    Ziegler et al., arXiv 1909.08593, equation 2; the divergence's estimator is k1 of http://joschu.net/blog/kl-approx.html.

    Args:
        score: of the whole response.
        logp: [n], of the actions by the policy that sampled them.
        ref_logp: [n], by the reference; None where `beta` is 0.
        states: n + 1, or n where room ran out.
    """
    rewards = np.zeros(states)
    if ref_logp is not None:
        rewards[: len(logp)] = -beta * (logp - ref_logp)
    rewards[-1] += score
    return rewards


def generalised_advantages(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Advantages of the states, float64: ``A_t = delta_t + gamma lam A_{t+1}``, ``delta_t = r_t + gamma V_{t+1} - V_t``.

    Schulman et al., arXiv 1506.02438, equation 16; what is behind the last state is worth nothing.

    Args:
        rewards, values: of the states, in order.
    """
    advantages = np.zeros(len(values))
    value = advantage = 0.0
    for at in reversed(range(len(values))):
        advantage = rewards[at] + gamma * value - values[at] + gamma * lam * advantage
        advantages[at], value = advantage, values[at]
    return advantages


def estimate(
    score: float,
    logp: Sequence[float],
    ref_logp: Sequence[float] | None,
    values: Sequence[float],
    beta: float,
    discounts: Discounts,
) -> TokenEstimates:
    """A response's advantages and returns.

    Args:
        score: reward of the whole response.
        logp: [n], log-probability of each trained token by the policy before the step's updates.
        ref_logp: [n], by the reference; None where `beta` is 0.
        values: [n + 1], of the states; [n] where room ran out.
        beta: weight of the divergence from the reference.
        discounts: how far a reward reaches back.

    Raises:
        ValueError: the lengths are others.
    """
    n = len(logp)
    if not n or len(values) not in (n, n + 1) or (ref_logp is not None and len(ref_logp) != n):
        others = "no" if ref_logp is None else len(ref_logp)
        raise ValueError(
            f"{n} log-probabilities, {others} of the reference's and {len(values)} values; expected n, n, and n or n + 1"
        )
    logps, values64 = np.asarray(logp, np.float64), np.asarray(values, np.float64)
    refs = None if ref_logp is None else np.asarray(ref_logp, np.float64)
    rewards = token_rewards(score, logps, refs, beta, len(values64))
    of_policy, of_value = discounts.of_policy(n), discounts.of_value
    advantages = generalised_advantages(rewards, values64, discounts.gamma, of_policy)
    targets = advantages if of_value == of_policy else generalised_advantages(rewards, values64, discounts.gamma, of_value)
    penalty = 0.0 if refs is None else float(-beta * (logps - refs).sum())
    return TokenEstimates(advantages[:n], targets + values64, penalty)


@dataclass(frozen=True)
class Whitening:
    """Takes the mean off advantages and divides by their standard deviation."""

    mean: float
    scale: float
    """``1 / sqrt(variance + EPS)``"""

    def __call__(self, advantages: np.ndarray) -> np.ndarray:
        """Float64, the shape that is given."""
        return (advantages - self.mean) * self.scale


EPS = 1e-8
"""Added to the variance of advantages, as in open-instruct's `masked_whiten`."""


def whitening(advantages: Sequence[np.ndarray]) -> Whitening:
    """Of all actions of a global batch; the variance is the sample's, with N - 1 in the denominator.

    open-instruct whitens on each data-parallel rank by itself, which makes a result depend on the layout.

    Args:
        advantages: of each response. Their order changes the last bits, so callers keep to one.
    """
    every = np.concatenate(advantages) if advantages else np.zeros(0)
    if len(every) < 2:
        return Whitening(float(every.sum()), 1 / EPS**0.5)
    return Whitening(float(every.mean()), float((every.var(ddof=1) + EPS) ** -0.5))
