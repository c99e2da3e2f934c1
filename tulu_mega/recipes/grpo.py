"""Reinforcement learning with verifiable rewards by groups of responses (Tulu 3.1; GRPO: Shao et al., arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Mapping

from tulu_mega.config import GrpoSettings
from tulu_mega.launch.launcher import World
from tulu_mega.objectives.advantages import ESTIMATORS, AdvantageEstimator
from tulu_mega.objectives.policy import PolicyObjective
from tulu_mega.resilience.guards import Guards
from tulu_mega.rl.learner import PolicyLearner, Trained
from tulu_mega.rl.policy_run import opened_policy
from tulu_mega.train.run import Beside
from tulu_mega.train.session import Session
from tulu_mega.train.step_clock import StepClock


def run(settings: GrpoSettings, world: World) -> None:
    """Each step: vLLM answers prompts with the newest weights, verifiers judge, Megatron learns, the weights go to vLLM.

    Goes on from the newest checkpoint in the run directory; exports the model at the end.

    Raises:
        UserError: on every rank, for whatever the user can mend.
        Stopped: on every rank, when one was asked to end.
    """
    with opened_policy(settings, world, Grpo(settings)) as policy:
        policy.train()


class Grpo:
    """Responses are compared with the others to their prompt; the policy alone learns."""

    def __init__(self, settings: GrpoSettings):
        self._settings = settings

    @property
    def estimator(self) -> AdvantageEstimator:
        return ESTIMATORS[self._settings.policy.advantages]

    @property
    def objective(self) -> PolicyObjective:
        return PolicyObjective.of(self._settings.policy, self._settings.sampling.max_tokens)

    def beside(self, session: Session) -> Mapping[str, Beside]:
        return {}

    def learner(self, policy: Trained, beside: Mapping[str, Beside], guards: Guards, clock: StepClock) -> PolicyLearner:
        return PolicyLearner(policy, self._settings, guards, clock)
