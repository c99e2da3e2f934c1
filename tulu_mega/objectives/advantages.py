"""Advantages: by how much a response to a prompt is better than was to be expected, from the rewards of all responses to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

EPS = 1e-4
"""Added to a group's standard deviation, as in TRL: rewards that differ by less are noise. Tulu 3's GRPO has 1e-8."""
SAME = 1e-6
"""Rewards are equal that differ by no more than this part of the larger: some roundings of float32, in which TRL and
open-instruct hold rewards (0.1 + 0.2 and 0.3 are one number there) and a reward model gives its scores."""
NOTHING = 1e-12
"""Rewards are equal that differ by no more than this: what is left of 0.1 + 0.2 - 0.3."""


@dataclass(frozen=True)
class GroupAdvantages:
    """The advantages of the responses to one prompt, in their order."""

    advantages: tuple[float, ...]
    """0 where not trained"""
    trained: tuple[bool, ...]
    """False of responses without a reward and of those that are masked for their length: they are in no loss and no count"""
    rewards: tuple[float | None, ...]
    """the rewards that the advantages were estimated from, penalties included; None where the verifier failed"""

    @property
    def failed(self) -> int:
        """Responses that have no reward, because their verifier failed."""
        return sum(reward is None for reward in self.rewards)

    @property
    def informative(self) -> bool:
        """Whether any trained response has an advantage. A group of equal rewards has none: nothing to learn from. DAPO
        (arXiv 2503.14476) and open-instruct leave such a group out by its standard deviation, too."""
        return any(self.advantages)


@dataclass(frozen=True)
class GroupRewards(GroupAdvantages):
    """The rewards of the responses to one prompt in the place of advantages: each token's comes later, from a value model."""

    @property
    def informative(self) -> bool:
        """Whether responses of different rewards are trained; a group of one has none to compare with."""
        known = [reward for reward, trained in zip(self.rewards, self.trained, strict=True) if trained]
        return len(known) > 1 and not _same(known)


class AdvantageEstimator(Protocol):
    """Estimates the advantages of all responses to one prompt."""

    def __call__(self, rewards: Sequence[float | None], masked: Sequence[bool]) -> GroupAdvantages:
        """
        Args:
            rewards: of each response; None where the verifier failed: not trained on, and in no statistics.
            masked: responses that are not trained on, but whose rewards count.
        """
        ...


@dataclass(frozen=True)
class GroupEstimator:
    """An advantage is ``factor * (reward - mean)``, the mean being that of the n responses of the group that have a reward.

    Advantages do not depend on the responses' order, and are exactly 0 where all rewards are equal, but for rounding, or there is
    one only.
    """

    factor: Callable[[Sequence[float]], float]
    """function of the n differences ``reward - mean``, n at least 2"""

    def __call__(self, rewards: Sequence[float | None], masked: Sequence[bool]) -> GroupAdvantages:
        """As :class:`AdvantageEstimator`.

        Raises:
            ValueError: not as many of one as of the other.
        """
        trained = _trained(rewards, masked)
        known = [reward for reward in rewards if reward is not None]
        if len(known) < 2 or _same(known):
            return GroupAdvantages((0.0,) * len(rewards), trained, tuple(rewards))
        mean = math.fsum(known) / len(known)  # fsum rounds once, whatever the order
        factor = self.factor([reward - mean for reward in known])
        advantages = tuple(factor * (reward - mean) if train else 0.0 for reward, train in zip(rewards, trained, strict=True))
        return GroupAdvantages(advantages, trained, tuple(rewards))


def whole_rewards(rewards: Sequence[float | None], masked: Sequence[bool]) -> GroupRewards:
    """An :class:`AdvantageEstimator` whose advantages are the rewards themselves.

    Raises:
        ValueError: not as many of one as of the other.
    """
    trained = _trained(rewards, masked)
    given = tuple(reward if train else 0.0 for reward, train in zip(rewards, trained, strict=True))
    return GroupRewards(given, trained, tuple(rewards))


def _trained(rewards: Sequence[float | None], masked: Sequence[bool]) -> tuple[bool, ...]:
    return tuple(reward is not None and not left_out for reward, left_out in zip(rewards, masked, strict=True))


def _same(rewards: Sequence[float]) -> bool:
    return math.isclose(min(rewards), max(rewards), rel_tol=SAME, abs_tol=NOTHING)


def _centred(differences: Sequence[float]) -> float:
    """Liu et al., arXiv 2503.20783, Dr. GRPO: ``reward - mean``."""
    return 1.0


def _standardised(differences: Sequence[float]) -> float:
    """Shao et al., arXiv 2402.03300, section 4.1.2: ``(reward - mean) / (s + EPS)``.

    The deviation s is the sample's, with n - 1 in the denominator: torch's ``std``, which Tulu 3's GRPO and TRL take.
    """
    return 1 / (math.sqrt(math.fsum(difference**2 for difference in differences) / (len(differences) - 1)) + EPS)


def _leave_one_out(differences: Sequence[float]) -> float:
    """Ahmadian et al., arXiv 2402.14740: ``reward - mean of the others``, which is ``n / (n - 1) (reward - mean)``."""
    return len(differences) / (len(differences) - 1)


ESTIMATORS: Mapping[str, AdvantageEstimator] = {
    "centred": GroupEstimator(_centred),
    "standardised": GroupEstimator(_standardised),
    "leave_one_out": GroupEstimator(_leave_one_out),
}
"""The values of `policy.advantages`, and what they stand for."""


def penalised(rewards: Sequence[float | None], truncated: Sequence[bool], penalty: float) -> list[float | None]:
    """The rewards of a whole group, with a penalty in the place of the reward, or of none, of each response that was cut off.

    A response that was cut off stays in its group: dropped earlier, the others would be compared with less than their group.

    Args:
        truncated: responses whose room ran out.
    """
    return [penalty if cut else reward for reward, cut in zip(rewards, truncated, strict=True)]
