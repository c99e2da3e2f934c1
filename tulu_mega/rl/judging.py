"""What responses earn: verifiers by each row's ``dataset`` column, and a reward model where one is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tulu_mega.config import RewardSettings
from tulu_mega.data.prompts import Prompt
from tulu_mega.records import Rollout
from tulu_mega.rewards.pool import VerifierPool
from tulu_mega.rewards.registry import RewardSpec
from tulu_mega.rewards.verdict import Verdict, VerifierInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ModelScores = Callable[[Sequence[Rollout]], list[float]]
"""A reward model's score of each response."""


@dataclass(frozen=True)
class Judged:
    """A response and what it earned."""

    rollout: Rollout
    text: str
    """what the verifiers read: special tokens left out"""
    verdict: Verdict
    reward: float | None
    """``scale`` times the verifiers' sum, plus the weighted score of the reward model; None where a verifier failed"""
    model_score: float | None = None

    @property
    def solved(self) -> bool:
        """Whether every verifier gave at least 1."""
        return self.verdict.score is not None and all(part >= 1 for part in self.verdict.parts.values())


def reward_spec(settings: RewardSettings) -> RewardSpec:
    """The verifiers' part of the settings."""
    return RewardSpec(weights=dict(settings.weights), custom=dict(settings.custom), aliases=dict(settings.aliases))


class Rewards:
    """Verifier processes that work while other responses are still being generated. A context manager.

    Args:
        settings: of the rewards.
        names: verifiers that the rows need.
        tokenizer: makes responses text again, for verifiers.
        model_scores: the reward model, if there is one.

    Raises:
        UserError: the settings name what is not there.
    """

    def __init__(
        self,
        settings: RewardSettings,
        names: Iterable[str],
        tokenizer: PreTrainedTokenizerFast,
        model_scores: ModelScores | None = None,
    ):
        self._settings, self._tokenizer, self._model_scores = settings, tokenizer, model_scores
        self._pool = VerifierPool(reward_spec(settings), names, settings.workers, settings.timeout, settings.memory_mib)

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def begin(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Future[Verdict]]:
        """Queues the responses to a prompt; from any thread."""
        return [
            self._pool.submit(VerifierInput(self._text(rollout), prompt.dataset, prompt.ground_truth, prompt.messages))
            for rollout in rollouts
        ]

    def finish(
        self, groups: Sequence[Sequence[Rollout]], verdicts: Sequence[Sequence[Future[Verdict]]], greedy: bool = False
    ) -> list[list[Judged]]:
        """Waits for the verdicts (each within its time-out) and adds them up.

        Args:
            groups: the responses to each prompt.
            verdicts: what :meth:`begin` gave for them.
            greedy: leave the reward model aside.
        """
        flat = [rollout for group in groups for rollout in group]
        scores: Sequence[float | None] = [None] * len(flat)
        if self._model_scores and not greedy:
            scores = self._model_scores(flat)
        score = iter(scores)
        return [
            [self._judged(rollout, future.result(), next(score)) for rollout, future in zip(group, futures, strict=True)]
            for group, futures in zip(groups, verdicts, strict=True)
        ]

    def _judged(self, rollout: Rollout, verdict: Verdict, model_score: float | None) -> Judged:
        reward = None if verdict.score is None else self._settings.scale * verdict.score
        if reward is not None and model_score is not None:
            reward += self._settings.model_weight * model_score
        return Judged(rollout, self._text(rollout), verdict, reward, model_score)

    def _text(self, rollout: Rollout) -> str:
        return self._tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
