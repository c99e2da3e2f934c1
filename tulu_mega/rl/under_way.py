"""What is answered and not trained on, as a file of a checkpoint: a run that goes on asks and judges none of it again."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tulu_mega.errors import UserError
from tulu_mega.records import Response, Segment
from tulu_mega.rewards.verdict import Verdict
from tulu_mega.rl.judging import JudgedResponse, Rewards
from tulu_mega.rl.rollouts import Answers, Group, Round
from tulu_mega.rl.scheduler import Scheduler

FILE = "rollouts.json.gz"


def files(scheduler: Scheduler) -> dict[str, bytes]:
    """The file's content by its name; nothing where nothing is under way."""
    groups, rounds = scheduler.under_way
    if not groups and not rounds:
        return {}
    told = {"groups": [_group(each) for each in groups], "rounds": [_round(each) for each in rounds]}
    return {FILE: gzip.compress(json.dumps(told, separators=(",", ":")).encode(), compresslevel=3, mtime=0)}


def restore(scheduler: Scheduler, rewards: Rewards, state: dict[str, Any], step: int, checkpoint: Path) -> None:
    """Have a scheduler go on from a checkpoint.

    Args:
        rewards: judge what had no verdict yet.
        state: the scheduler's.
        step: steps done.
        checkpoint: its directory.

    Raises:
        UserError: the file cannot be read.
    """
    file = checkpoint / FILE
    told: dict[str, Any] = {"groups": [], "rounds": []}
    try:
        if file.exists():
            told = json.loads(gzip.decompress(file.read_bytes()))
        groups = [_as_group(scheduler, each) for each in told["groups"]]
        rounds = [_as_round(scheduler, rewards, each) for each in told["rounds"]]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        why = f"{file} could not be read ({type(error).__name__}: {error})"
        raise UserError(f"{why}; remove {checkpoint} to go on from the checkpoint before") from None
    scheduler.restore(state, step, groups, rounds)


def _group(group: Group) -> dict[str, Any]:
    judged = [
        {
            "response": _response(one.response),
            "text": one.text,
            "verdict": asdict(one.verdict),
            "reward": one.reward,
            "model_score": one.model_score,
        }
        for one in group.judged
    ]
    return {"place": group.place, "judged": judged, "rewards": list(group.advantages.rewards), "seconds": group.seconds}


def _as_group(scheduler: Scheduler, told: dict[str, Any]) -> Group:
    judged = [
        JudgedResponse(_as_response(one["response"]), one["text"], Verdict(**one["verdict"]), one["reward"], one["model_score"])
        for one in told["judged"]
    ]
    return scheduler.group(told["place"], judged, told["rewards"], told["seconds"])


def _round(asked: Round) -> dict[str, Any]:
    answers = asked.answers.result()  # there by now: a checkpoint is saved while no server is at work
    return {
        "version": asked.version,
        "first": asked.places.start,
        "seconds": answers.seconds,
        "responses": [[_response(one) for one in group] for group in answers.responses],
        "verdicts": [[asdict(each.result()) if each.done() else None for each in group] for group in answers.verdicts],
    }


def _as_round(scheduler: Scheduler, rewards: Rewards, told: dict[str, Any]) -> Round:
    places = range(told["first"], told["first"] + len(told["responses"]))
    responses = [[_as_response(one) for one in group] for group in told["responses"]]
    verdicts = [
        [_as_verdict(scheduler, rewards, place, *each) for each in zip(group, known, strict=True)]
        for place, group, known in zip(places, responses, told["verdicts"], strict=True)
    ]
    answers: Future[Answers] = Future()
    answers.set_result(Answers(responses, verdicts, told["seconds"]))
    return Round(told["version"], places, answers)


def _as_verdict(
    scheduler: Scheduler, rewards: Rewards, place: int, response: Response, known: dict[str, Any] | None
) -> Future[Verdict]:
    """The verdict as it was; where there was none yet, the response is judged again."""
    if known is None:
        return rewards.begin(scheduler.prompt(place), [response])[0]
    verdict: Future[Verdict] = Future()
    verdict.set_result(Verdict(**known))
    return verdict


def _response(response: Response) -> dict[str, Any]:
    return {"segments": [asdict(segment) for segment in response.segments], "finish_reason": response.finish_reason}


def _as_response(told: dict[str, Any]) -> Response:
    return Response(tuple(Segment(**each) for each in told["segments"]), told["finish_reason"])
