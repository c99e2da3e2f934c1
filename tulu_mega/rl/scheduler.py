"""Draws prompts, has them answered and judged, and decides which responses a step trains on. Rank 0 only."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from tulu_mega.config import PolicyRunSettings
from tulu_mega.data.prompts import Prompt, PromptSet, PromptStream
from tulu_mega.inference.sampling import Sampling
from tulu_mega.objectives.advantages import AdvantageEstimator, GroupAdvantages, penalised
from tulu_mega.records import Response
from tulu_mega.rewards.verdict import Verdict
from tulu_mega.rl.judging import JudgedResponse, Rewards, count_kinds

Done = Callable[[int, list[Response]], None]


class Generates(Protocol):
    """Answers prompts, as :class:`tulu_mega.inference.client.RolloutClient` does."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        version: int,
        numbers: Sequence[int] | None = None,
        done: Done | None = None,
    ) -> list[list[Response]]: ...


@dataclass(frozen=True)
class Group:
    """A prompt, the responses to it and their advantages."""

    place: int
    """the prompt's index in the stream of prompts"""
    prompt: Prompt
    judged: list[JudgedResponse]
    advantages: GroupAdvantages


@dataclass
class StepRollouts:
    """The responses of a step, and the time they took."""

    version: int
    """version of the weights that answered"""
    groups: list[Group] = field(default_factory=list)
    """the groups that are trained on, in the order of the stream"""
    left_out: list[Group] = field(default_factory=list)
    """the groups that nothing can be learned from"""
    generating: float = 0.0
    """seconds that the servers took"""
    judging: float = 0.0
    """seconds that verifiers and reward model took after the servers had answered"""
    rounds: int = 0
    """times that prompts were asked: once, and once for each refill"""

    def figures(self) -> dict[str, float]:
        """Metrics of all responses of the step, including those that are not trained on; lengths count trained tokens."""
        groups = [*self.groups, *self.left_out]
        every = [one for group in groups for one in group.judged]
        valid = [one for one in every if one.verdict.score is not None]
        rewards = [reward for group in groups for reward in group.advantages.rewards if reward is not None]
        lengths = [one.response.num_trained for one in every]
        tokens = sum(lengths)
        return {
            "reward": _mean(rewards),
            "solve_rate": _mean(float(one.solved) for one in valid),
            "response_length": _mean(lengths),
            "response_length_max": max(lengths, default=0),
            "truncated": _mean(float(one.response.finish_reason == "length") for one in every),
            "verifier_failures": len(every) - len(valid),
            **count_kinds("zeros", every),
            "responses": len(every),
            "groups": len(self.groups),
            "equal_groups": sum(not group.advantages.informative for group in groups),
            "refills": self.rounds - 1,
            "generated_tokens": tokens,
            "generated_tokens_per_second": tokens / max(self.generating, 1e-9),
            "seconds_generation": self.generating,
            "seconds_rewards": self.judging,
        }


@dataclass(frozen=True)
class Evaluation:
    """The most probable responses to held-out prompts."""

    prompts: PromptSet
    judged: list[JudgedResponse]

    def figures(self) -> dict[str, float]:
        """Mean score and share solved of the responses that could be judged; lengths and truncation of all."""
        valid = [one for one in self.judged if one.verdict.score is not None]
        return {
            "heldout_score": _mean(one.verdict.score for one in valid),
            "heldout_solve_rate": _mean(float(one.solved) for one in valid),
            "heldout_length": _mean(one.response.num_trained for one in self.judged),
            "heldout_truncated": _mean(float(one.response.finish_reason == "length") for one in self.judged),
            "heldout_verifier_failures": len(self.judged) - len(valid),
            **count_kinds("heldout_zeros", self.judged),
        }


class Scheduler:
    """Asks the prompts of each step. Synchronous: all responses of a step are drawn from the weights that it begins with.

    Reproducible: prompts and the random stream of each response follow from the seed and the place in the stream of prompts.
    That place is the only state.

    Args:
        prompts: the prompts that are drawn.
        generator: answers them.
        rewards: judges the responses.
        estimator: gives the responses to a prompt their advantages.
        settings: the run's.
        ends: tokens that end a response, besides those that the servers' model directory names: the tokenizer's eos. Servers
            know no tokenizer.
    """

    def __init__(
        self,
        prompts: PromptSet,
        generator: Generates,
        rewards: Rewards,
        estimator: AdvantageEstimator,
        settings: PolicyRunSettings,
        ends: tuple[int, ...],
    ):
        self._prompts, self._generator, self._rewards, self._settings = prompts, generator, rewards, settings
        self._estimator, self._ends = estimator, ends
        self._stream = PromptStream(len(prompts), settings.seed, settings.data.shuffle)
        self._place = 0

    @property
    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        return {"place": self._place}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._place = state["place"]

    def next(self, version: int) -> StepRollouts:
        """Ask as many prompts as a step takes; in the place of those that teach nothing, others, `train.refills` times.

        Args:
            version: version of the weights that are to answer.

        Raises:
            ServerFailure: no server answers.
        """
        train = self._settings.train
        step = StepRollouts(version)
        while step.rounds <= train.refills and len(step.groups) < train.prompts:
            for group in self._round(train.prompts - len(step.groups), step):
                worth = group.advantages.informative if train.filter_equal else any(group.advantages.trained)
                (step.groups if worth else step.left_out).append(group)
        return step

    def evaluate(self, prompts: PromptSet, version: int) -> Evaluation:
        """The most probable response to each prompt, judged by its verifiers.

        Args:
            version: version of the weights that are to answer.

        Raises:
            ServerFailure: no server answers.
        """
        sampling = Sampling(max_tokens=self._settings.sampling.max_tokens, stop_ids=self._ends)
        answers, verdicts = self._answered(prompts.prompts, sampling, version)
        judged = self._rewards.finish(answers, verdicts, greedy=True)
        return Evaluation(prompts, [one for (one,) in judged])

    def _round(self, count: int, step: StepRollouts) -> list[Group]:
        """Ask the next prompts of the stream, and add the time it takes to the step."""
        settings = self._settings.sampling
        places = list(range(self._place, self._place + count))
        prompts = [self._prompts[self._stream[place]] for place in places]
        sampling = Sampling(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            samples=settings.samples,
            seed=self._settings.seed,
            stop_ids=self._ends,
        )
        began = time.perf_counter()
        answers, verdicts = self._answered(prompts, sampling, step.version, places)
        generated = time.perf_counter()
        judged = self._rewards.finish(answers, verdicts)
        step.generating += generated - began
        step.judging += time.perf_counter() - generated
        step.rounds += 1
        self._place += count
        rewards = [self._rewards_of(*each) for each in zip(places, judged, strict=True)]
        if self._settings.rewards.shuffle and settings.samples == 1:
            rewards = [[reward] for reward in self._dealt([reward for (reward,) in rewards], places[0])]
        return [self._group(*each) for each in zip(places, prompts, judged, rewards, strict=True)]

    def _answered(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, numbers: Sequence[int] | None = None
    ) -> tuple[list[list[Response]], list[list[Future[Verdict]]]]:
        """The responses to each prompt and their future verdicts; verifiers work while other prompts are still answered."""
        verdicts: dict[int, list[Future[Verdict]]] = {}

        def done(index: int, responses: list[Response]) -> None:
            verdicts[index] = self._rewards.begin(prompts[index], responses)

        answers = self._generator.generate([prompt.ids for prompt in prompts], sampling, version, numbers, done)
        return answers, [verdicts[index] for index in range(len(prompts))]

    def _rewards_of(self, place: int, judged: list[JudgedResponse]) -> list[float | None]:
        """The rewards of the responses to a prompt, penalties for length among them.

        Lengths are looked at here, where the group is whole. `rewards.shuffle` deals the rewards out among the responses, with
        the penalties for length: left with the responses they belong to, those would teach length.
        """
        policy = self._settings.policy
        rewards = [one.reward for one in judged]
        if policy.overlong == "penalise":
            rewards = penalised(rewards, _cut_off(judged), policy.overlong_reward)
        return self._dealt(rewards, place) if self._settings.rewards.shuffle else rewards

    def _dealt(self, rewards: list[float | None], place: int) -> list[float | None]:
        random.Random(f"{self._settings.seed} {place}").shuffle(rewards)
        return rewards

    def _group(self, place: int, prompt: Prompt, judged: list[JudgedResponse], rewards: list[float | None]) -> Group:
        """The responses to a prompt with their advantages."""
        masked = [cut and self._settings.policy.overlong == "mask" for cut in _cut_off(judged)]
        return Group(place, prompt, judged, self._estimator(rewards, masked))


def _cut_off(judged: Sequence[JudgedResponse]) -> list[bool]:
    return [one.response.finish_reason == "length" for one in judged]


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
