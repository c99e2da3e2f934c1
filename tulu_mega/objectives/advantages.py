"""Rewards of a prompt's responses to what each response is better than the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

EPS = 1e-4
"""Added to a group's standard deviation, as in TRL: rewards that differ by less are noise. Tulu 3's GRPO has 1e-8."""


@dataclass(frozen=True)
class GroupAdvantages:
    """Of one prompt's responses, in their order."""

    advantages: tuple[float, ...]
    """0 where not trained"""
    trained: tuple[bool, ...]
    """False of responses without a reward and of those that are masked for their length: they are in no loss and no count"""
    rewards: tuple[float | None, ...]
    """as the statistics had them, penalties in the place of what they replace; None where the verifier failed"""

    @property
    def failed(self) -> int:
        """Responses that have no reward, because their verifier failed."""
        return sum(reward is None for reward in self.rewards)

    @property
    def informative(self) -> bool:
        """Whether any trained response has an advantage. A group of equal rewards has none: nothing to learn from."""
        return any(self.advantages)


def group_advantages(
    rewards: Sequence[float | None],
    truncated: Sequence[bool],
    kind: Literal["centred", "standardised", "leave_one_out"],
    overlong: Literal["keep", "mask", "penalise"] = "keep",
    overlong_reward: float = -10.0,
) -> GroupAdvantages:
    """Advantages within a group of all responses to one prompt.

    With mean and standard deviation s over the n responses of the group that have a reward:

    - ``centred``: ``reward - mean`` (Liu et al., arXiv 2503.20783, Dr. GRPO).
    - ``standardised``: ``(reward - mean) / (s + EPS)`` (Shao et al., arXiv 2402.03300, section 4.1.2), where s is the sample's,
      with n - 1 in the denominator: torch's ``std``, which Tulu 3's GRPO and TRL take.
    - ``leave_one_out``: ``reward - mean of the others``, which is ``n / (n - 1) (reward - mean)`` (Ahmadian et al.,
      arXiv 2402.14740).

    Groups are whole when they come here and lengths are looked at here, after grouping: dropping a response that was cut off
    earlier would compare the others with less than their group, or with another's. ``penalise`` puts ``overlong_reward`` in
    the place of its reward, a missing one too; ``mask`` leaves its reward in the statistics and does not train on it.

    Advantages do not depend on the responses' order, and are exactly 0 where all rewards are equal or there is one only.

    Args:
        rewards: None where the verifier failed: taken out of the group.
        truncated: responses whose room ran out.
    """
    counted = list(rewards)
    if overlong == "penalise":
        counted = [overlong_reward if cut else reward for reward, cut in zip(rewards, truncated, strict=True)]
    known = [reward for reward in counted if reward is not None]
    trained = tuple(
        reward is not None and not (cut and overlong == "mask") for reward, cut in zip(counted, truncated, strict=True)
    )
    if len(set(known)) < 2:
        return GroupAdvantages((0.0,) * len(counted), trained, tuple(counted))
    n = len(known)
    mean = math.fsum(known) / n  # fsum rounds once, whatever the order
    if kind == "standardised":
        scale = 1 / (math.sqrt(math.fsum((reward - mean) ** 2 for reward in known) / (n - 1)) + EPS)
    else:
        scale = n / (n - 1) if kind == "leave_one_out" else 1.0
    advantages = tuple(scale * (reward - mean) if train else 0.0 for reward, train in zip(counted, trained, strict=True))
    return GroupAdvantages(advantages, trained, tuple(counted))
