"""Reinforcement learning with verifiable rewards and a value model (PPO: Schulman et al., arXiv 1707.06347).

Tulu 3's own (arXiv 2411.15124, section 6): its reward is 10 for a right answer and -10 for one without an end, less the
divergence from the initial model at each token; its value model begins as a reward model.
"""

from __future__ import annotations

from collections.abc import Mapping

from tulu_mega.config import PpoSettings
from tulu_mega.launch.launcher import World
from tulu_mega.objectives.advantages import AdvantageEstimator, whole_rewards
from tulu_mega.objectives.policy import PolicyObjective
from tulu_mega.objectives.value import ValueObjective
from tulu_mega.resilience.guards import Guards
from tulu_mega.rl.actor_critic import ActorCritic
from tulu_mega.rl.learner import Trained
from tulu_mega.rl.policy_run import opened_policy
from tulu_mega.train.run import Beside
from tulu_mega.train.session import Session
from tulu_mega.train.step_clock import StepClock


def run(settings: PpoSettings, world: World) -> None:
    """Each step: vLLM answers prompts with the newest weights, verifiers judge, the value model tells what each token was worth,
    both models learn, the policy's weights go to vLLM.

    Goes on from the newest checkpoint in the run directory; exports both models at the end.

    Raises:
        UserError: on every rank, for whatever the user can mend.
        Stopped: on every rank, when one was asked to end.
    """
    with opened_policy(settings, world, Ppo(settings)) as policy:
        policy.train()


class Ppo:
    """Each token is compared with what the value model expected; policy and value model learn."""

    def __init__(self, settings: PpoSettings):
        self._settings = settings

    @property
    def estimator(self) -> AdvantageEstimator:
        return whole_rewards

    @property
    def objective(self) -> PolicyObjective:
        return PolicyObjective.without_divergence(self._settings.policy, self._settings.sampling.max_tokens)

    def beside(self, session: Session) -> Mapping[str, Beside]:
        value, optim = self._settings.value, self._settings.optim
        if value.lr is not None:
            optim = optim.model_copy(update={"lr": value.lr, "min_lr": min(optim.min_lr, value.lr)})
        model = session.beside(value.path, reward=True, new_head=value.new_head, parallel=value.parallel)
        return {"value": Beside(model, optim, value.updates, "hf_value")}

    def learner(self, policy: Trained, beside: Mapping[str, Beside], guards: Guards, clock: StepClock) -> ActorCritic:
        value = self._settings.value
        critic = Trained(beside["value"].session.engine, ValueObjective(value.coefficient, value.clip))
        return ActorCritic(policy, critic, self._settings, guards, clock)
