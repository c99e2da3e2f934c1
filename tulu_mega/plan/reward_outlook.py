"""What a reward model takes beside a policy that it scores for: it lies in the policy's layout and does not train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tulu_mega.plan.model.calibration import RATES
from tulu_mega.plan.model.job import Job
from tulu_mega.plan.model.memory import RankMemory
from tulu_mega.plan.model.timing import score_seconds


@dataclass(frozen=True)
class RewardOutlook:
    """Of a reward model."""

    job: Job
    """one sampled step's responses"""
    scoring: float
    """seconds of a step in which it scores them"""

    def beside(self, policy: Sequence[RankMemory]) -> list[RankMemory]:
        """The policy's pipeline ranks with its weights."""
        return [replace(own, rewards=self.job.itemsize * self.job.held[own.rank].total) for own in policy]


def reward_outlook(jobs: Sequence[Job]) -> RewardOutlook:
    """Plans a reward model.

    Args:
        jobs: of each sampled step.
    """
    return RewardOutlook(jobs[0], sum(score_seconds(job, RATES) for job in jobs) / len(jobs))
