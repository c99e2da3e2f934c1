"""Writes responses and their rewards: RUN_DIR/rollouts/*.jsonl, one object a response."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tulu_mega.data.json_text import readable_line
from tulu_mega.data.prompts import Prompt
from tulu_mega.launch.run_files import named, write_whole
from tulu_mega.rl.judging import JudgedResponse
from tulu_mega.rl.rollouts import Evaluation, StepRollouts
from tulu_mega.train.metrics import json_number

FOLDER = "rollouts"
Differences = Mapping[tuple[int, int], tuple[float, float]]
"""(place of the prompt, number of the response) -> mean and largest |log-probability by sampler less that by trainer|"""


def rollouts_file(run_dir: Path, step: int) -> Path:
    """The file of a step, counted from 1."""
    return run_dir / FOLDER / f"step_{step:06}.jsonl"


def evaluation_file(run_dir: Path, step: int) -> Path:
    """The file of the responses to the held-out prompts after so many steps."""
    return run_dir / FOLDER / f"heldout_{step:06}.jsonl"


def write_rollouts(
    run_dir: Path,
    step: int,
    rollouts: StepRollouts,
    differences: Differences,
    means: Mapping[tuple[int, int], float] | None = None,
) -> None:
    """Write all responses of a step, including those that are not trained on, in the order of their prompts' places.

    ``reward`` is what the advantages were estimated from, with penalties for length and as `rewards.shuffle` dealt them out;
    ``verdict_reward`` is what verifiers and reward model gave. A response without a number has null.

    Args:
        means: by place and number, the mean advantage of each trained response's tokens, where tokens have their own; taken for
            the groups' advantages.
    """
    trained = {group.place for group in rollouts.groups}
    groups = sorted([*rollouts.groups, *rollouts.left_out], key=lambda group: group.place)
    _write(
        rollouts_file(run_dir, step),
        (
            {
                "place": group.place,
                "sample": number,
                **_line(group.prompt, one, {"reward": reward, "verdict_reward": one.reward}),
                "advantage": advantage if means is None else means.get((group.place, number)),
                "trained": group.place in trained and group.advantages.trained[number],
                **_difference(differences.get((group.place, number))),
            }
            for group in groups
            for number, (one, advantage, reward) in enumerate(
                zip(group.judged, group.advantages.advantages, group.advantages.rewards, strict=True)
            )
        ),
    )


def write_evaluation(run_dir: Path, step: int, evaluation: Evaluation) -> None:
    """Write the responses to the held-out prompts, in the prompts' order."""
    pairs = zip(evaluation.prompts.prompts, evaluation.judged, strict=True)
    lines = (_line(prompt, one, {"reward": one.reward, "score": one.verdict.score}) for prompt, one in pairs)
    _write(evaluation_file(run_dir, step), lines)


def _line(prompt: Prompt, one: JudgedResponse, rewards: Mapping[str, float | None]) -> dict[str, Any]:
    response, verdict = one.response, one.verdict
    versions = sorted(set(response.versions))
    return {
        "messages": prompt.messages,
        "ground_truth": prompt.ground_truth,
        "dataset": prompt.dataset,
        "response": one.text,
        "tokens": response.num_trained,
        "finish_reason": response.finish_reason,
        **rewards,
        "scores": verdict.parts,
        **({"detail": verdict.detail} if verdict.detail else {}),
        **({"kind": verdict.kind} if verdict.kind else {}),
        **({"error": verdict.error} if verdict.error else {}),
        **({"model_score": one.model_score} if one.model_score is not None else {}),
        "version": versions[0] if len(versions) == 1 else versions,
    }


def _difference(difference: tuple[float, float] | None) -> dict[str, float | str]:
    if difference is None:
        return {}
    mean, largest = map(json_number, difference)
    return {"logp_difference_mean": mean, "logp_difference_max": largest}


def _write(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    with named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(readable_line(line) + "\n" for line in lines))
