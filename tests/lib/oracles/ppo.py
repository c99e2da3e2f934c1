"""PPO with a value model on padded tensors, written from the description of open-instruct's script of November 2024.

Nothing here is of the product. State t of a response is before its token t, one more is behind the last token: columns of
[B, R] tensors, where R is the most tokens that a response may have.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Masks:
    """Which columns are actions and states.

    Args:
        lengths: [B], tokens of each response.
        cut_off: [B] bool, whether the response's room ran out: no state is behind its last token.
        room: columns.
    """

    def __init__(self, lengths: Tensor, cut_off: Tensor, room: int):
        at = torch.arange(room)[None]
        self.of_policy = at < lengths[:, None]
        self.scored_at = torch.where(cut_off, lengths - 1, lengths)
        self.of_value = at <= self.scored_at[:, None]


def advantages_and_returns(
    masks: Masks,
    score: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    beta: float,
    lam: float | Tensor,
    gamma: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """[B, R] each: advantages whitened over all actions, and returns from those that are not. A lam may be [B], of responses."""
    values = torch.where(masks.of_value, values, 0)
    rewards = torch.where(masks.of_policy, -beta * (logp - ref_logp), 0)
    rewards[torch.arange(len(score)), masks.scored_at] += score
    room, advantage, reversed_ = values.shape[1], torch.zeros_like(score), []
    for t in reversed(range(room)):
        later = values[:, t + 1] if t < room - 1 else 0.0
        advantage = rewards[:, t] + gamma * later - values[:, t] + gamma * lam * advantage
        reversed_.append(advantage)
    advantages = torch.stack(reversed_[::-1], 1)
    chosen = advantages[masks.of_policy]
    white = (advantages - chosen.mean()) * (chosen.var(unbiased=True) + 1e-8).rsqrt()
    return torch.where(masks.of_policy, white, 0), advantages + values


def mean_of_means(losses: Tensor, mask: Tensor) -> Tensor:
    """Mean over responses of the mean over a response's columns."""
    return (torch.where(mask, losses, 0).sum(1) / mask.sum(1)).mean()


def mean(losses: Tensor, mask: Tensor) -> Tensor:
    """Over all columns of all responses."""
    return losses[mask].mean()


def value_loss(
    masks: Masks,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    clip: float,
    coefficient: float,
    reduced: Callable[[Tensor, Tensor], Tensor] = mean_of_means,
) -> Tensor:
    """Half the larger of two squares, clipped and not; half the square where nothing is clipped."""
    bounded = torch.clamp(values, old_values - clip, old_values + clip) if clip else values
    larger = torch.maximum((values - returns) ** 2, (bounded - returns) ** 2)
    return coefficient * reduced(0.5 * larger, masks.of_value)


def policy_loss(
    masks: Masks,
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    clip: float,
    reduced: Callable[[Tensor, Tensor], Tensor] = mean_of_means,
) -> Tensor:
    """The clipped surrogate."""
    ratio = (logp - old_logp).exp()
    larger = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return reduced(larger, masks.of_policy)
