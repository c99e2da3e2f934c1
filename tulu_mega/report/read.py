"""Reads a run directory for a report. Missing or torn files leave gaps and raise nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tulu_mega.errors import UserError
from tulu_mega.outside.json_input import read_json_text
from tulu_mega.report.profiles import Profile, read_profiles
from tulu_mega.report.shapes import finite, is_step, shows_rollout, shows_sample, shows_task

METRICS, CONFIG, RESULTS = "metrics.jsonl", "config.json", "results.json"


@dataclass(frozen=True)
class Evaluation:
    """One ``results.json`` of `tulu-mega eval` and some of its samples."""

    name: str
    """the directory it lies in"""
    tasks: dict[str, dict[str, Any]]
    """each task's entry in results.json"""
    samples: dict[str, list[dict[str, Any]]]
    """the first problems of each task, with responses"""


@dataclass(frozen=True)
class Run:
    """A run: its steps, settings and evaluations."""

    name: str
    directory: Path
    steps: list[dict[str, Any]]
    """the objects of metrics.jsonl, by step"""
    start: dict[str, Any] = field(default_factory=dict)
    """figures of the model before the first step, from its answers to the held-out prompts"""
    settings: dict[str, Any] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    """some responses of the newest step that has them, with its number as ``step``"""
    notes: list[str] = field(default_factory=list)
    """remarks about files that could not be read"""
    profiles: list[Profile] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The kind of the run's loss, for people; losses of different kinds are not compared. Empty where no file tells it."""
        sections = (self.settings.get(name) for name in ("policy", "preference", "train"))
        policy, preference, train = (each if isinstance(each, dict) else {} for each in sections)
        if policy or "reward" in self._names:
            method = "ppo" if self.settings.get("value") or "value_loss" in self._names else "grpo"
            return " ".join(filter(None, [method, _unlike("grpo", policy.get("loss"))]))
        if preference or "chosen_logp" in self._names:
            return " ".join(filter(None, ["dpo", _unlike("dpo", preference.get("loss"))]))
        if "margin" in self._names:
            return "rm"
        if "nll" in self._names or "reduction" in train:
            return " ".join(filter(None, ["sft", _unlike("sum", train.get("reduction"))]))
        return ""

    @property
    def _names(self) -> set[str]:
        return set(self.steps[-1])

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was reported as a finite number."""
        known = ((row["step"], row.get(name)) for row in ({"step": 0, **self.start}, *self.steps))
        pairs = [(step, number) for step, value in known if (number := finite(value)) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]


def read_runs(directories: Sequence[str], samples: int) -> list[Run]:
    """
    Args:
        directories: of runs; named in the report by what tells them apart.
        samples: problems to read of each evaluated task.

    Raises:
        UserError: with every directory that is none, or has no metrics.
    """
    paths, problems, runs = [Path(name).expanduser() for name in directories], [], []
    names = _names(paths)
    for path, name in zip(paths, names, strict=True):
        try:
            runs.append(read_run(path, name, samples))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return runs


def read_run(directory: Path, name: str, samples: int) -> Run:
    """
    Raises:
        UserError: not a directory, or no metrics in it.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give the run directory of a training command")
    file = directory / METRICS
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        inside = sorted(found.parent for found in directory.glob(f"*/{METRICS}"))
        hint = f"; did you mean {inside[0]}?" if inside else "; give the run directory of a training command"
        raise UserError(f"{directory}: no {METRICS} in it{hint}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    steps, torn = _steps(content)
    if not any(row["step"] for row in steps):
        raise UserError(f"{file}: no step in it{' but torn lines' if torn else ''}; let the run finish its first step")
    notes = [f"{METRICS}: {torn} torn or foreign line{'s' if torn > 1 else ''} left out"] if torn else []
    settings = _json(directory / CONFIG, notes)
    evaluations = []
    for results in sorted([*directory.glob(RESULTS), *directory.glob(f"*/{RESULTS}")]):
        content = _json(results, notes)
        if isinstance(content.get("tasks"), dict):
            evaluations.append(_evaluation(results.parent, content["tasks"], samples))
    rollouts = _rollouts(directory, steps[-1]["step"], samples)
    profiles = read_profiles(directory, notes)
    return Run(name, directory, steps, _start(directory), settings, evaluations, rollouts, notes, profiles)


def _unlike(usual: str, given: object) -> str:
    """Return the part of a setting that its name does not say already."""
    return f"({given})" if given and given != usual else ""


def _names(paths: list[Path]) -> list[str]:
    """The shortest tails of the paths that are all different; numbered where even whole paths are the same."""
    resolved = [path.resolve().parts for path in paths]
    for length in range(1, max((len(parts) for parts in resolved), default=0) + 1):
        names = ["/".join(parts[-length:]) for parts in resolved]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, 1)]


def _steps(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The steps in order, the later line where one was written twice, and how many lines were none."""
    found: dict[int, dict[str, Any]] = {}
    torn = 0
    for line in content.splitlines():
        if not line.strip():
            continue
        try:
            row = read_json_text(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and is_step(row.get("step")):
            found[row["step"]] = row
        else:
            torn += 1
    return [found[step] for step in sorted(found)], torn


def _json(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        content = read_json_text(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        notes.append(f"{file.name}: not readable, left out")
        return {}
    return content if isinstance(content, dict) else {}


def _start(directory: Path) -> dict[str, float]:
    """The figures of the held-out prompts before the first step, which has no line in the metrics of `grpo`."""
    file = directory / "rollouts/heldout_000000.jsonl"
    if not file.is_file():
        return {}
    found: dict[str, list[float]] = {}
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            line = read_json_text(text)
            failed = line.get("error") is not None
            figures = {
                "heldout_solve_rate": all(score >= 1 for score in line["scores"].values()) if line.get("scores") else None,
                "heldout_score": line.get("score"),  # older files do not say
                "heldout_length": line.get("tokens"),
                "heldout_truncated": line["finish_reason"] == "length" if "finish_reason" in line else None,
            }
            for name, value in figures.items():
                judged = name in ("heldout_solve_rate", "heldout_score")
                if (number := finite(value)) is not None and not (failed and judged):
                    found.setdefault(name, []).append(number)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _rollouts(directory: Path, last: int, count: int) -> list[dict[str, Any]]:
    """Responses of the newest step, spread over its prompts; files of later steps are of a run that was put back."""
    files = {int(file.stem[5:]): file for file in (directory / "rollouts").glob("step_*.jsonl") if file.stem[5:].isdecimal()}
    step = max((step for step in files if 0 < step <= last), default=None)
    if step is None or not count:
        return []
    found = []
    for line in files[step].read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            if shows_rollout(record := read_json_text(line)):
                found.append({"step": step, **record})
    return found[:: max(1, len(found) // max(count, 1))][:count]


def _evaluation(directory: Path, tasks: dict[str, Any], samples: int) -> Evaluation:
    shown: dict[str, list[dict[str, Any]]] = {}
    known = {name: task for name, task in tasks.items() if shows_task(task)}
    files = {file.stem: file for file in (directory / "samples").glob("*.jsonl") if file.is_file()}  # names may be no file's
    for task in filter(files.__contains__, known):
        with files[task].open(encoding="utf-8", errors="replace") as lines:
            for line in islice(lines, samples):
                try:
                    record = read_json_text(line)
                except ValueError:
                    continue
                if shows_sample(record):
                    shown.setdefault(task, []).append(record)
    return Evaluation(directory.name, known, shown)
