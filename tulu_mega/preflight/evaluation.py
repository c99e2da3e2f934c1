"""What is wrong with an evaluation: everything that it finds itself before vLLM starts."""

from __future__ import annotations

from tulu_mega.evaluation.run import Asked, prepared
from tulu_mega.evaluation.settings import EvalSettings
from tulu_mega.inference.adapters import checked
from tulu_mega.inference.offline import check_vllm
from tulu_mega.preflight.findings import Findings


def problems(settings: EvalSettings, findings: Findings) -> None:
    """Of the model, and of every task's rows, worked examples and prompts."""
    ready = findings.collect(lambda: prepared(settings))
    if ready:
        _settings, _tokenizer, tasks = ready
        findings.notes += checked(settings.model.path, settings.adapter)
        findings.notes += [_asked(task) for task in tasks]
        if any(task.open for task in tasks):
            findings.notes += check_vllm(settings.python).notes


def _asked(task: Asked) -> str:
    groups = len({problem.group for problem in task.problems})
    of = f" of {groups} groups" if groups > 1 else ""
    before = len(task.problems) - len(task.open)
    answered = f", {before:,} of them answered before" if before else ""
    return f"tasks.{task.task.name}: {len(task.problems):,} problems{of}, {task.shots} worked examples{answered}"
