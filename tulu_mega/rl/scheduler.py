"""Which prompts are asked when, and which of their responses are trained on. Rank 0 only."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from tulu_mega.config import GrpoSettings
from tulu_mega.data.prompts import Prompt, PromptSet, PromptStream
from tulu_mega.inference.sampling import Sampling
from tulu_mega.objectives.advantages import GroupAdvantages, group_advantages
from tulu_mega.records import Rollout
from tulu_mega.rewards.verdict import Verdict
from tulu_mega.rl.judging import Judged, Rewards

Done = Callable[[int, list[Rollout]], None]
Overlong = Literal["keep", "mask", "penalise"]


class Generates(Protocol):
    """What answers prompts, such as :class:`tulu_mega.inference.client.RolloutClient`."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        version: int,
        numbers: Sequence[int] | None = None,
        done: Done | None = None,
    ) -> list[list[Rollout]]: ...


@dataclass(frozen=True)
class Group:
    """A prompt, the responses to it and what they are worth."""

    place: int
    """in the stream of prompts"""
    prompt: Prompt
    judged: list[Judged]
    advantages: GroupAdvantages


@dataclass
class StepRollouts:
    """What a step trains on, and what it took to get it."""

    version: int
    """of the weights that answered"""
    groups: list[Group] = field(default_factory=list)
    """those that are trained on, in the order of the stream"""
    left_out: list[Group] = field(default_factory=list)
    """those that nothing can be learned from"""
    generating: float = 0.0
    """seconds"""
    judging: float = 0.0
    """seconds that verifiers and reward model took beyond those"""
    rounds: int = 0
    """times that prompts were asked: 1, and the refills"""

    def figures(self) -> dict[str, float]:
        """Over all responses of the step, also those that are not trained on."""
        groups = [*self.groups, *self.left_out]
        every = [one for group in groups for one in group.judged]
        valid = [one for one in every if one.verdict.score is not None]
        rewards = [reward for group in groups for reward in group.advantages.rewards if reward is not None]
        lengths = [len(one.rollout.response_ids) for one in every]
        tokens = sum(lengths)
        return {
            "reward": _mean(rewards),
            "solve_rate": _mean(float(one.solved) for one in valid),
            "response_length": _mean(lengths),
            "response_length_max": max(lengths, default=0),
            "truncated": _mean(float(one.rollout.finish_reason == "length") for one in every),
            "verifier_failures": len(every) - len(valid),
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
    """Greedy answers to held-out prompts."""

    prompts: PromptSet
    judged: list[Judged]

    def figures(self) -> dict[str, float]:
        """Mean score and share solved, of what could be judged; lengths and truncation of all."""
        valid = [one for one in self.judged if one.verdict.score is not None]
        return {
            "heldout_score": _mean(one.verdict.score for one in valid),
            "heldout_solve_rate": _mean(float(one.solved) for one in valid),
            "heldout_length": _mean(len(one.rollout.response_ids) for one in self.judged),
            "heldout_truncated": _mean(float(one.rollout.finish_reason == "length") for one in self.judged),
            "heldout_verifier_failures": len(self.judged) - len(valid),
        }


class Scheduler:
    """Synchronous: every response of a step is of the weights that the step begins with.

    Reproducible: prompts and the random stream of each response follow from the seed and the place in the stream of prompts,
    which is all the state there is.

    Args:
        prompts: to draw from.
        generator: answers them.
        rewards: judges the answers.
        settings: of the run.
        ends: tokens that end a response, besides those that the servers' model directory names: the tokenizer's eos. Servers
            know no tokenizer.
    """

    def __init__(
        self,
        prompts: PromptSet,
        generator: Generates,
        rewards: Rewards,
        settings: GrpoSettings,
        ends: tuple[int, ...],
    ):
        self._prompts, self._generator, self._rewards, self._settings = prompts, generator, rewards, settings
        self._ends = ends
        self._stream = PromptStream(len(prompts), settings.seed, settings.data.shuffle)
        self._place = 0

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"place": self._place}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._place = state["place"]

    def next(self, version: int) -> StepRollouts:
        """Asks as many prompts as a step takes; where nothing can be learned from some, others in their place, a few times.

        Args:
            version: of the weights that are to answer.

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
        """The most probable answer to each prompt, judged by its verifier."""
        sampling = Sampling(max_tokens=self._settings.sampling.max_tokens, stop_ids=self._ends)
        verdicts: dict[int, list[Future[Verdict]]] = {}

        def done(index: int, rollouts: list[Rollout]) -> None:
            verdicts[index] = self._rewards.begin(prompts[index], rollouts)

        asked = [prompt.ids for prompt in prompts.prompts]
        answers = self._generator.generate(asked, sampling, version, done=done)
        judged = self._rewards.finish(answers, [verdicts[index] for index in range(len(prompts))], greedy=True)
        return Evaluation(prompts, [one for (one,) in judged])

    def _round(self, count: int, step: StepRollouts) -> list[Group]:
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
        verdicts: dict[int, list[Future[Verdict]]] = {}

        def done(index: int, rollouts: list[Rollout]) -> None:
            verdicts[index] = self._rewards.begin(prompts[index], rollouts)

        began = time.perf_counter()
        answers = self._generator.generate([prompt.ids for prompt in prompts], sampling, step.version, places, done)
        generated = time.perf_counter()
        judged = self._rewards.finish(answers, [verdicts[index] for index in range(count)])
        step.generating += generated - began
        step.judging += time.perf_counter() - generated
        step.rounds += 1
        self._place += count
        overlong = self._settings.policy.overlong
        if self._settings.rewards.shuffle:
            judged = [self._dealt_out(group, place) for group, place in zip(judged, places, strict=True)]
            overlong = "keep" if overlong == "penalise" else overlong  # penalties are dealt out already, to whomever
        return [
            Group(place, prompt, group, self._advantages(group, overlong))
            for place, prompt, group in zip(places, prompts, judged, strict=True)
        ]

    def _dealt_out(self, judged: list[Judged], place: int) -> list[Judged]:
        """The group with each other's rewards; what the verifiers said of a response stays with it.

        Penalties for length are rewards too: left with the responses they belong to, they would teach length.
        """
        rewards = list(self._advantages(judged, self._settings.policy.overlong).rewards)
        random.Random(f"{self._settings.seed} {place}").shuffle(rewards)
        return [replace(one, reward=reward) for one, reward in zip(judged, rewards, strict=True)]

    def _advantages(self, judged: list[Judged], overlong: Overlong) -> GroupAdvantages:
        policy = self._settings.policy
        return group_advantages(
            [one.reward for one in judged],
            [one.rollout.finish_reason == "length" for one in judged],
            kind=policy.advantages,
            overlong=overlong,
            overlong_reward=policy.overlong_reward,
        )


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
