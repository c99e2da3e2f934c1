"""Settings of `tulu-mega grpo`, and the work of one of its steps."""

from __future__ import annotations

from tulu_mega.config.policy_run import PolicyRunSettings, sampled
from tulu_mega.config.rollout import PolicySettings
from tulu_mega.config.workload import Workload


class GrpoSettings(PolicyRunSettings):
    """`tulu-mega grpo`: reinforcement learning with verifiable rewards, by groups of responses."""

    policy: PolicySettings = PolicySettings()


def workload(settings: GrpoSettings) -> Workload:
    """Prompts, to which servers sample groups of responses.

    The old weights' log-probabilities are scored where a step has several updates (of one alone they are its own), the initial
    model's where the loss compares with it.
    """
    updates = settings.train.mini_batches * settings.train.passes
    return sampled(settings, (updates > 1) + settings.policy.reads_reference)
