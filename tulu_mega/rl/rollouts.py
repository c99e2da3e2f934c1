"""What becomes of prompts that are asked: responses, groups, the rollouts of a step."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from tulu_mega.data.prompts import Prompt, PromptSet
from tulu_mega.objectives.advantages import GroupAdvantages
from tulu_mega.records import Response
from tulu_mega.rewards.verdict import Verdict
from tulu_mega.rl.judging import JudgedResponse, count_kinds


@dataclass(frozen=True)
class Group:
    """A prompt, the responses to it and their advantages."""

    place: int
    """the prompt's index in the stream of prompts"""
    prompt: Prompt
    judged: list[JudgedResponse]
    advantages: GroupAdvantages
    seconds: float = 0.0
    """its part of those that servers took for the prompts that were asked with it"""


@dataclass(frozen=True)
class Answers:
    """The responses to prompts that were asked at once, and the verdicts on them, which may be under way."""

    responses: list[list[Response]]
    verdicts: list[list[Future[Verdict]]]
    seconds: float
    """that the servers took"""


@dataclass(frozen=True)
class Round:
    """Prompts that are asked at once, of weights of one version."""

    version: int
    places: range
    answers: Future[Answers]


@dataclass
class StepRollouts:
    """The responses of a step, and the time they took."""

    version: int
    """version of the weights that train on them"""
    groups: list[Group] = field(default_factory=list)
    """the groups that are trained on, in the order of the stream"""
    left_out: list[Group] = field(default_factory=list)
    """the groups that nothing can be learned from"""
    generating: float = 0.0
    """seconds that the step waited for servers before it could begin"""
    judging: float = 0.0
    """seconds that it waited for verifiers and reward model after the servers had answered"""
    answering: float = 0.0
    """seconds that the servers took for its responses, beside training or not"""
    rounds: int = 0
    """times that prompts were drawn: once, and once for each refill"""

    def figures(self) -> dict[str, float]:
        """Metrics of all responses of the step, including those that are not trained on; lengths count trained tokens."""
        groups = [*self.groups, *self.left_out]
        every = [one for group in groups for one in group.judged]
        valid = [one for one in every if one.verdict.score is not None]
        rewards = [reward for group in groups for reward in group.advantages.rewards if reward is not None]
        lengths = [one.response.num_trained for one in every]
        tokens = sum(lengths)
        lags = [self.version - version for one in every for version in one.response.versions]
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
            "generated_tokens_per_second": tokens / max(self.answering, 1e-9),
            "seconds_generation": self.generating,
            "seconds_rewards": self.judging,
            "seconds_servers": self.answering,
            "policy_lag": _mean(lags),
            "policy_lag_max": max(lags, default=0),
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


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
