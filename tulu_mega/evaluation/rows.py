"""Problems and worked examples from files and hub names in the tasks' public formats."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tulu_mega.data.sources import JsonArray, Part, Rows, load_rows
from tulu_mega.errors import UserError
from tulu_mega.evaluation import harness_prompts
from tulu_mega.evaluation.choice import even
from tulu_mega.evaluation.settings import TaskSettings
from tulu_mega.evaluation.task import Problem, Row, Shot, Task, asked
from tulu_mega.outside.json_input import read_json_text

MAX_PROBLEMS = 5
"""Bad rows that are told at once."""


def problems(task: Task, settings: TaskSettings) -> list[Problem]:
    """A task's problems; at most `settings.limit`, evenly of all groups (of all files, where rows have none).

    Raises:
        UserError: no such data, or rows of another format; the first ones by file and line, with the fields expected.
    """
    named = f"tasks.{task.name}"
    source, split = settings.data or list(task.hub), settings.split or task.split
    rows = _open(source, split, f"{named}.data", f"{named}.split", bool(task.choices))
    found = _each(rows, _worded(task, settings) if harness_prompts.named(settings.shots_from) else task.read, task)
    # a file's place, not its name: the same rows elsewhere are the same problems
    groups = [problem.group or f"file {rows.origin(row)[0]}" for row, problem in enumerate(found)]
    return [replace(found[row], row=row) for row in even(groups, settings.limit)]


def shots(task: Task, settings: TaskSettings) -> list[Shot]:
    """All worked examples there are to choose from, in order.

    Raises:
        UserError: no such data, rows of another format, or the task takes none.
    """
    if settings.shots_from is None:
        return list(task.own_shots)
    if task.shot is None:
        raise UserError(f"tasks.{task.name}.shots_from = {settings.shots_from!r}, but {task.title} takes no worked examples")
    if harness_prompts.named(settings.shots_from):
        return harness_prompts.read(settings.shots_from, task.name, f"tasks.{task.name}.shots_from").shots
    path = Path(settings.shots_from).expanduser()
    if path.is_dir() and any(path.glob("*.txt")):
        return _cot_prompts(path)
    named = f"tasks.{task.name}"
    rows = _open(settings.shots_from, settings.shots_split, f"{named}.shots_from", f"{named}.shots_split", bool(task.choices))
    return _each(rows, task.shot, task)


def _worded(task: Task, settings: TaskSettings) -> Callable[[Row], Problem]:
    """Reads rows into problems that are asked in the words of the harness' task whose worked examples are taken."""
    prompts = harness_prompts.read(str(settings.shots_from), task.name, f"tasks.{task.name}.shots_from")

    def read(row: Row) -> Problem:
        problem = task.read(row)
        question = prompts.question(row, problem.group)
        return problem if question is None else replace(problem, messages=asked(question))

    return read


def problems_and_shots(task: Task, settings: TaskSettings, shots_wanted: bool) -> tuple[list[Problem], list[Shot]]:
    """A task's problems and the worked examples there are to choose from, none where none are wanted.

    Raises:
        UserError: as for either, with everything that is wrong with both.
    """
    told: list[str] = []
    found: list[list[Any]] = [[], []]
    for place, read in enumerate((problems, shots) if shots_wanted else (problems,)):
        try:
            found[place] = read(task, settings)
        except UserError as error:
            told += error.problems
    if told:
        raise UserError(told)
    return found[0], found[1]


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


def _each(rows: Rows, read: Any, task: Task) -> list[Any]:
    found, bad = [], []
    for index in range(len(rows)):
        try:
            found.append(read(rows.row(index)))
        except ValueError as error:
            bad.append(f"{rows.where(index)}: {error}; {task.title} expects {task.fields}")
            if len(bad) == MAX_PROBLEMS:
                raise UserError([*bad, "reading stopped here; later rows may be bad too"]) from None
    if bad:
        raise UserError(bad)
    return found


def _open(names: str | list[str], split: str, setting: str, split_setting: str, tables: bool) -> Rows:
    """Rows of files and hub names; also of what BIG-Bench Hard and MMLU were published as, JSON objects with `examples` and CSV
    without headings, and of directories of that.

    Args:
        setting, split_setting: where they and their split are named, for messages.
        tables: whether CSV is read, as questions with choices.
    """
    parts: list[Part] = []
    problems: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        path = Path(name).expanduser()
        try:
            if tables and (files := _files(path, ".csv")):
                parts += [_choices(file) for file in files]
                continue
            examples = [part for file in _files(path, ".json") if (part := _examples(file)) is not None]
            parts += examples or load_rows(name, split, setting=setting, split_setting=split_setting).parts
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return Rows(parts)


def _files(path: Path, kind: str) -> list[Path]:
    """A file that ends so, or those of a directory."""
    if path.is_dir():
        return sorted(path.glob(f"*{kind}"))
    return [path] if path.suffix == kind and path.is_file() else []


def _choices(file: Path) -> JsonArray:
    """The rows of one of MMLU's files (github.com/hendrycks/test): question, four choices and a letter; its name is the subject.

    Raises:
        UserError: it cannot be read, or a row has other columns.
    """
    subject = re.sub(r"_(test|dev|val)$", "", file.stem.removeprefix("mmlu_"))
    found, bad = [], []
    try:
        with file.open(newline="", encoding="utf-8-sig") as content:
            for number, row in enumerate(csv.reader(content, strict=True), 1):
                if len(row) != 6:
                    bad.append(f"{file} row {number}: has {len(row)} columns; expected a question, four choices and a letter")
                else:
                    found.append({"question": row[0], "choices": row[1:5], "answer": row[5].strip(), "subject": subject})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as CSV: {error}; expected MMLU's own, or JSONL") from None
    if bad or not found:
        raise UserError(bad[:MAX_PROBLEMS] or f"{file}: has no rows; expected a question, four choices and a letter in each")
    return JsonArray(str(file), found, file.name)


def _examples(file: Path) -> JsonArray | None:
    """The rows of a file of the form ``{"examples": [...]}``, each with the file's name as `task`; None for other files."""
    try:
        content = read_json_text(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    rows = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        return None
    named = [{"task": file.stem, **row} if isinstance(row, dict) else row for row in rows]
    return JsonArray(str(file), named, file.name)


def _cot_prompts(directory: Path) -> list[Shot]:
    """Worked examples of BIG-Bench Hard's public ``cot-prompts/TASK.txt``.

    After a line of dashes stand what the task is, then ``Q:`` and ``A:`` in turn. The first example opens with the former.
    """
    found = []
    for file in sorted(directory.glob("*.txt")):
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read as text: {error}") from None
        text = content.replace("\r\n", "\n").partition("\n-----\n")[2]
        task, *blocks = ("\n" + text).split("\nQ:")
        opening = f"{task.strip()}\n\n" if task.strip() else ""
        for block in blocks:
            question, answer, worked = block.partition("\nA:")
            if not answer:
                raise UserError(f"{file}: a 'Q:' without an 'A:' behind it; expected the format of BIG-Bench Hard's cot-prompts")
            start, step, rest = worked.strip().partition("Let's think step by step.")
            asked, opening = f"{opening}Q: {question.strip()}\nA: Let's think step by step.", ""
            found.append(Shot(asked, (rest if step and not start else worked).strip(), file.stem))
    if not found:
        raise UserError(f"{directory}: no 'Q:' and 'A:' in its *.txt; expected the format of BIG-Bench Hard's cot-prompts")
    return found
