"""Judging responses: a task's own judge here, or the verifiers of `rewards`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tulu_mega.errors import UserError
from tulu_mega.evaluation.task import Problem, Task, Values

if TYPE_CHECKING:
    from tulu_mega.rewards.verdict import Verdict

MAX_PROBLEMS = 5
"""Bad rows that are told at once."""


@dataclass(frozen=True)
class Judgement:
    """What a response earned. ``values`` is None when it could not be judged; ``error`` then says why."""

    values: Values | None
    detail: str = ""
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``scores`` by metric (their sum where the count is 1, else [sum, count]), ``detail``, ``error``."""
        if self.values is None:
            return {"scores": None, "error": self.error}
        scores = {name: earned if count == 1 else [earned, count] for name, (earned, count) in self.values.items()}
        return {"scores": scores, **({"detail": self.detail} if self.detail else {})}


def check(task: Task, problems: list[Problem], custom: Mapping[str, str]) -> None:
    """Finds answers that cannot be judged before anything is asked.

    Args:
        custom: verifiers of the user's own, name to ``module:function``.

    Raises:
        UserError: an unknown verifier, or ground truths of the wrong form; the first ones by the problem's number.
    """
    if task.judge is not None:
        return
    from tulu_mega.rewards.registry import Judge, RewardSpec

    verifiers = Judge(RewardSpec.as_published(custom=dict(custom)))
    bad: list[str] = []
    for place, problem in enumerate(problems):
        number = 1 + (place if problem.row is None else problem.row)
        found = verifiers.check({"dataset": problem.verifier, "ground_truth": problem.answer})
        bad += [f"{task.title}, problem {number}: {text}" for text in found]
        if len(bad) >= MAX_PROBLEMS:
            raise UserError([*bad[:MAX_PROBLEMS], "checking stopped here; later problems may be bad too"])
    if bad:
        raise UserError(bad)


def judge(task: Task, problems: list[Problem], responses: list[list[str]], custom: Mapping[str, str]) -> list[list[Judgement]]:
    """Judges the responses to each problem.

    Args:
        problems: the task's.
        responses: to each problem, one or several.
        custom: verifiers of the user's own, name to ``module:function``.
    """
    if task.judge is not None:
        return [[_own(task, problem, text) for text in texts] for problem, texts in zip(problems, responses, strict=True)]
    from tulu_mega.rewards.pool import VerifierPool
    from tulu_mega.rewards.registry import RewardSpec
    from tulu_mega.rewards.verdict import VerifierInput

    pairs = [(problem, text) for problem, texts in zip(problems, responses, strict=True) for text in texts]
    names = {name for problem in problems for name in _names(problem)}
    with VerifierPool(RewardSpec.as_published(custom=dict(custom)), names=sorted(names)) as pool:
        verdicts = pool.judge(
            VerifierInput(problem.program(text) if problem.program else text, problem.verifier, problem.answer, problem.messages)
            for problem, text in pairs
        )
    each = iter(verdicts)
    return [[_verdict(task.metrics[0], next(each)) for _ in texts] for texts in responses]


def _names(problem: Problem) -> list[str]:
    return [problem.verifier] if isinstance(problem.verifier, str) else list(problem.verifier or ())


def _verdict(metric: str, verdict: Verdict) -> Judgement:
    if verdict.score is None:
        return Judgement(None, error=verdict.error)
    return Judgement({metric: (verdict.score, 1)}, verdict.detail)


def _own(task: Task, problem: Problem, response: str) -> Judgement:
    try:
        return Judgement(task.judge(response, problem.answer))
    except Exception as error:  # about the judge, not about the response
        return Judgement(None, error=f"{type(error).__name__}: {error}")
