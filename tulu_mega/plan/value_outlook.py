"""The steps and memory of a value model beside a policy, planned as those of a model of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tulu_mega.plan.model.calibration import RATES
from tulu_mega.plan.model.job import Job
from tulu_mega.plan.model.memory import RankMemory, memory_by_rank
from tulu_mega.plan.model.timing import Step, mean_step, score_seconds, train_step


@dataclass(frozen=True)
class ValueOutlook:
    """The plan of a value model."""

    job: Job
    """one sampled update"""
    memory: list[RankMemory]
    """memory of each of its pipeline ranks, as if it were alone"""
    step: Step
    """mean of the sampled updates; all of a step together"""
    scoring: float
    """seconds of a step in which values are computed without training"""

    def by_policys_rank(self, policy: Job) -> list[list[RankMemory]]:
        """For each of the policy's pipeline ranks, those of the value model on the same GPUs: ranks are numbered along the
        pipeline last."""
        own, ranks = policy.parallel.pipeline, self.job.parallel.pipeline
        size = self.job.world // ranks
        return [
            [
                self.memory[at]
                for at in range(rank * policy.world // own // size, ((rank + 1) * policy.world // own - 1) // size + 1)
            ]
            for rank in range(own)
        ]

    def has_groups(self, policy: Job) -> bool:
        """Whether its layout has groups of its own beside the policy's."""
        both = (policy.parallel, self.job.parallel)
        return len({(each.tensor, each.context, each.pipeline, each.virtual_pipeline) for each in both}) > 1

    @property
    def seconds(self) -> float:
        """Return the seconds of a step."""
        return self.step.seconds + self.scoring


def value_outlook(jobs: Sequence[Sequence[Job]], updates: int, scorings: int) -> ValueOutlook:
    """Plans a value model.

    Args:
        jobs: of each sampled step, its mini-batches.
        updates: of a step.
        scorings: passes over all a step's sequences without training.

    Raises:
        UserError: for a model or layout that does not fit together.
    """
    every = [job for one in jobs for job in one]
    forward = sum(score_seconds(job, RATES) for job in every) / len(jobs)
    made = mean_step([train_step(job, RATES) for job in every], updates)
    return ValueOutlook(every[0], memory_by_rank(every[0]), made, forward * scorings)
