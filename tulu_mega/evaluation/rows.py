"""Problems and worked examples from files and hub names in the tasks' public formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tulu_mega.data.sources import JsonArray, Part, Rows, load_rows
from tulu_mega.errors import UserError
from tulu_mega.evaluation.settings import TaskSettings
from tulu_mega.evaluation.task import Problem, Shot, Task

MAX_PROBLEMS = 5
"""Bad rows that are told at once."""


def problems(task: Task, settings: TaskSettings) -> list[Problem]:
    """A task's problems, at most `settings.limit`.

    Raises:
        UserError: no such data, or rows of another format; the first ones by file and line, with the fields expected.
    """
    rows = _open(settings.data or list(task.hub), settings.split or task.split)
    count = len(rows) if settings.limit is None else min(settings.limit, len(rows))
    return _each(rows, range(count), task.read, task)


def shots(task: Task, settings: TaskSettings) -> list[Shot]:
    """All worked examples there are to choose from, in order.

    Raises:
        UserError: no such data, rows of another format, or the task takes none.
    """
    if settings.shots_from is None:
        return list(task.own_shots)
    if task.shot is None:
        raise UserError(f"tasks.{task.name}.shots_from = {settings.shots_from!r}, but {task.title} takes no worked examples")
    path = Path(settings.shots_from).expanduser()
    if path.is_dir() and any(path.glob("*.txt")):
        return _cot_prompts(path)
    rows = _open(settings.shots_from, settings.shots_split)
    return _each(rows, range(len(rows)), task.shot, task)


def chosen(available: list[Shot], count: int, group: str) -> list[Shot]:
    """The first `count` worked examples of a group, or of all where none has that group.

    Raises:
        ValueError: there are not so many.
    """
    own = [shot for shot in available if shot.group == group] or available
    if len(own) < count:
        about = f" of {group!r}" if group else ""
        raise ValueError(f"{count} worked examples{about} wanted, {len(own)} there; lower shots or give more in shots_from")
    return own[:count]


def _each(rows: Rows, indices: range, read: Any, task: Task) -> list[Any]:
    found, bad = [], []
    for index in indices:
        try:
            found.append(read(rows.row(index)))
        except ValueError as error:
            bad.append(f"{rows.where(index)}: {error}; {task.title} expects {task.fields}")
            if len(bad) == MAX_PROBLEMS:
                raise UserError([*bad, "reading stopped here; later rows may be bad too"]) from None
    if bad:
        raise UserError(bad)
    return found


def _open(names: str | list[str], split: str) -> Rows:
    """Rows of files and hub names; BIG-Bench Hard's own files, one JSON object with `examples`, and directories of them too."""
    parts: list[Part] = []
    for name in [names] if isinstance(names, str) else names:
        path = Path(name).expanduser()
        files = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.suffix == ".json" and path.is_file() else []
        examples = [part for file in files if (part := _examples(file)) is not None]
        parts += examples or load_rows(name, split, any_columns=True).parts
    return Rows(parts)


def _examples(file: Path) -> JsonArray | None:
    """The rows of a file of the form ``{"examples": [...]}``, each with the file's name as `task`; None for other files."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    rows = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        return None
    named = [{"task": file.stem, **row} if isinstance(row, dict) else row for row in rows]
    return JsonArray(str(file), named, file.name)


def _cot_prompts(directory: Path) -> list[Shot]:
    """Worked examples of BIG-Bench Hard's public ``cot-prompts/TASK.txt``: after a line of dashes, ``Q:`` and ``A:`` in turn."""
    found = []
    for file in sorted(directory.glob("*.txt")):
        text = file.read_text(encoding="utf-8").replace("\r\n", "\n").partition("\n-----\n")[2]
        for block in ("\n" + text).split("\nQ:")[1:]:
            question, answer, worked = block.partition("\nA:")
            if not answer:
                raise UserError(f"{file}: a 'Q:' without an 'A:' behind it; expected the format of BIG-Bench Hard's cot-prompts")
            start, step, rest = worked.strip().partition("Let's think step by step.")
            asked = f"Q: {question.strip()}\nA: Let's think step by step."
            found.append(Shot(asked, (rest if step and not start else worked).strip(), file.stem))
    if not found:
        raise UserError(f"{directory}: no 'Q:' and 'A:' in its *.txt; expected the format of BIG-Bench Hard's cot-prompts")
    return found
