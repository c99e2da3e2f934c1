"""Rewards of responses: from the verifiers that each row's ``dataset`` column names, and from a reward model if there is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tulu_mega.config import RewardSettings
from tulu_mega.data.prompts import Prompt
from tulu_mega.data.stops import answer_text
from tulu_mega.records import Response
from tulu_mega.rewards.numbers import EXPECTED, number
from tulu_mega.rewards.pool import VerifierPool
from tulu_mega.rewards.registry import RewardSpec
from tulu_mega.rewards.sandbox import CodeLimits, self_test
from tulu_mega.rewards.verdict import Verdict, VerifierInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ModelScores = Callable[[Sequence[Response]], list[float]]
"""A reward model's score of each response."""


@dataclass(frozen=True)
class JudgedResponse:
    """A response and its reward."""

    response: Response
    text: str
    """what the verifiers read: the last answer, without special tokens"""
    verdict: Verdict
    reward: float | None
    """``scale`` times the verifiers' sum, plus the weighted score of the reward model; None where a verifier failed, or the
    reward model gave no finite number. What is trained on may be another: `GroupAdvantages.rewards` has penalties for length, and
    what `rewards.shuffle` deals out"""
    model_score: float | None = None

    @property
    def solved(self) -> bool:
        """Whether every verifier gave at least 1."""
        return self.verdict.score is not None and all(part >= 1 for part in self.verdict.parts.values())


def count_kinds(name: str, judged: Iterable[JudgedResponse]) -> dict[str, int]:
    """Count the responses that lost score other than by a wrong answer, by kind: ``{"zeros_time": 2}``. Kinds without a response
    are left out."""
    return dict(sorted(Counter(f"{name}_{one.verdict.kind}" for one in judged if one.verdict.kind).items()))


def reward_spec(settings: RewardSettings) -> RewardSpec:
    """Return the part of the settings that verifiers need."""
    return RewardSpec(
        weights=dict(settings.weights),
        custom=dict(settings.custom),
        aliases=dict(settings.aliases),
        code=CodeLimits(objects=settings.code_objects),
        math_accepts=tuple(settings.math_accepts),
    )


class Rewards:
    """Verifier processes that work while other responses are still being generated. A context manager.

    Args:
        settings: the run's section ``[rewards]``.
        names: the verifiers that the rows need.
        tokenizer: decodes responses for the verifiers, which read text.
        model_scores: the reward model, if there is one.

    Raises:
        UserError: the settings name a verifier that does not exist.
    """

    def __init__(
        self,
        settings: RewardSettings,
        names: Iterable[str],
        tokenizer: PreTrainedTokenizerFast,
        model_scores: ModelScores | None = None,
    ):
        self._settings, self._tokenizer, self._model_scores = settings, tokenizer, model_scores
        names = list(names)
        if "python_code" in names:
            print(self_test(), flush=True)
        self._pool = VerifierPool(reward_spec(settings), names, settings.workers, settings.timeout, settings.memory_mib)

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def begin(self, prompt: Prompt, responses: Sequence[Response]) -> list[Future[Verdict]]:
        """Queue the responses to a prompt for its verifiers. Any thread may call this."""
        return [
            self._pool.submit(VerifierInput(self._text(response), prompt.dataset, prompt.ground_truth, prompt.messages))
            for response in responses
        ]

    def finish(
        self, groups: Sequence[Sequence[Response]], verdicts: Sequence[Sequence[Future[Verdict]]], greedy: bool = False
    ) -> list[list[JudgedResponse]]:
        """Wait for the verdicts, each of which comes within its time-out, and compute the rewards.

        Args:
            groups: the responses to each prompt.
            verdicts: what :meth:`begin` returned for them.
            greedy: leave the reward model out.
        """
        flat = [response for group in groups for response in group]
        scores: Sequence[float | None] = [None] * len(flat)
        if self._model_scores and not greedy:
            scores = self._model_scores(flat)
        score = iter(scores)
        return [
            [self._judged(response, future.result(), next(score)) for response, future in zip(group, futures, strict=True)]
            for group, futures in zip(groups, verdicts, strict=True)
        ]

    def _judged(self, response: Response, verdict: Verdict, model_score: float | None) -> JudgedResponse:
        settings, text = self._settings, self._text(response)
        if verdict.score is None:
            return JudgedResponse(response, text, verdict, None, None if model_score is None else number(model_score))
        reward = settings.scale * verdict.score
        if model_score is not None:
            if number(model_score) is None:
                return JudgedResponse(response, text, _failed(verdict, f"the reward model's score is {model_score}"), None)
            reward += settings.model_weight * model_score
        if number(reward) is None:
            return JudgedResponse(response, text, _failed(verdict, f"the reward is {reward}"), None, model_score)
        return JudgedResponse(response, text, verdict, reward, model_score)

    def _text(self, response: Response) -> str:
        return answer_text(response.last_answer, response.finish_reason, self._tokenizer)


def _failed(verdict: Verdict, what: str) -> Verdict:
    """Turn a verdict whose reward is no finite number into an error that keeps the verifiers' words: the number would spoil its
    batch."""
    return replace(verdict, score=None, error=f"{what}; expected {EXPECTED}")
