"""IFEval (Zhou et al., arXiv 2311.07911): 25 kinds of instructions that a program can check.

A prompt counts when all its instructions are followed, an instruction by itself; strictly on the response as it is, loosely
when one of eight versions of it passes: without its first line, its last line or both, each with and without asterisks.
Tulu 3 reports the prompts, loosely.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulu_mega.errors import nearest
from tulu_mega.evaluation.instructions import CHECKS, Check
from tulu_mega.evaluation.task import Problem, Row, Task, Values, asked, text_field
from tulu_mega.rewards.reasoning import answer_of


def read(row: Row) -> Problem:
    """
    Raises:
        ValueError: a row of another form, or an instruction that is not IFEval's or has arguments of another form.
    """
    names, given = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not isinstance(given, list) or len(names) != len(given) or not names:
        raise ValueError("instruction_id_list and kwargs are not lists of the same length")
    instructions = []
    for name, arguments in zip(names, given, strict=True):
        if not isinstance(name, str) or name not in CHECKS:
            raise ValueError(f"instruction {name!r} is not one of IFEval's{nearest(str(name), CHECKS)}")
        if not isinstance(arguments, Mapping | None):
            raise ValueError(f"instruction {name} has kwargs {arguments!r}; expected an object or null")
        try:
            instructions.append([name, CHECKS[name].read(arguments or {})])
        except ValueError as error:
            raise ValueError(f"instruction {name} {error}") from None
    return Problem(asked(text_field(row, "prompt")), instructions)


def judge(response: str, answer: Any) -> Values:
    """Prompts and instructions followed, strictly and loosely; reasoning in ``<think>`` is not judged."""
    if (text := answer_of(response)) != response:
        response = text.strip()
    strict = [_follows([response], CHECKS[name], arguments) for name, arguments in answer]
    loose = [_follows(loose_versions(response), CHECKS[name], arguments) for name, arguments in answer]
    return {
        "prompt_loose": (float(all(loose)), 1),
        "prompt_strict": (float(all(strict)), 1),
        "instruction_loose": (float(sum(loose)), len(loose)),
        "instruction_strict": (float(sum(strict)), len(strict)),
    }


def loose_versions(response: str) -> list[str]:
    """The response as it is and without what a model likes to put around its answer."""
    lines = response.split("\n")
    cut = (lines, lines[1:], lines[:-1], lines[1:-1])
    texts = [response, *("\n".join(kept).strip() for kept in cut[1:])]
    return [*texts, *(text.replace("*", "") for text in texts)]


def _follows(versions: list[str], check: Check, arguments: dict[str, Any]) -> bool:
    return any(version.strip() and check.holds(version, **arguments) for version in versions)


TASK = Task(
    name="ifeval",
    title="IFEval",
    fields="prompt, instruction_id_list, kwargs (lists of the same length)",
    hub=("google/IFEval",),
    split="train",
    read=read,
    max_tokens=2048,
    metrics=("prompt_loose", "prompt_strict", "instruction_loose", "instruction_strict"),
    judge=judge,
)
