"""The terms of `explain` as tables and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich import box
from rich.table import Table

from tulu_mega.plan.explain import Term, kept_terms, memory_terms, time_terms
from tulu_mega.plan.model.calibration import RATES
from tulu_mega.plan.model.job import Job
from tulu_mega.plan.model.memory import RankMemory
from tulu_mega.plan.model.timing import train_step
from tulu_mega.plan.outlook import Outlook


def explanation(result: Outlook) -> list[Table]:
    """Memory of the fullest rank, what a layer keeps, and the seconds of the first sampled step."""
    memory, kept, seconds = _terms(result.job, result.fullest)
    gib = 2**30
    value = []
    if result.value:
        memories, _, times = _terms(result.value.job, max(result.value.memory, key=lambda rank: rank.total))
        value = [
            _table("memory of the value model's fullest rank, as if it were alone, GiB", memories, lambda v: f"{v / gib:.2f}"),
            _table("seconds of the value model's first sampled update, mean rank", times, lambda v: f"{v:.3f}"),
        ]
    return [
        _table(f"memory of rank {result.fullest.rank}, GiB", memory, lambda value: f"{value / gib:.2f}"),
        _table("what a layer keeps of a token on a rank, bytes", kept, lambda value: f"{value:,.0f}"),
        _table("seconds of the first sampled step (above: their mean), mean rank", seconds, lambda value: f"{value:.3f}"),
        *value,
    ]


def explained(result: Outlook) -> dict[str, Any]:
    """The same, for programs."""
    made = _told(result.job, result.fullest)
    if result.value:
        made["value"] = _told(result.value.job, max(result.value.memory, key=lambda rank: rank.total))
    return {"explained": made}


def _told(job: Job, rank: RankMemory) -> dict[str, Any]:
    names = ("memory", "kept", "seconds")
    return {name: _plain(terms) for name, terms in zip(names, _terms(job, rank), strict=True)}


def _terms(job: Job, rank: RankMemory) -> tuple[list[Term], list[Term], list[Term]]:
    return memory_terms(job, rank), kept_terms(job), time_terms(job, train_step(job, RATES))


def _table(title: str, terms: Iterable[Term], shown: Callable[[float], str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("part", "of what", "", "formula", "numbers"):
        table.add_column(name, justify="left" if name else "right", no_wrap=True)
    before = None
    for term in terms:
        table.add_row(
            "" if term.part == before else term.part.replace("_", "-"),
            term.what,
            shown(term.amount.value),
            term.formula,
            term.amount.text,
        )
        before = term.part
    return table


def _plain(terms: Iterable[Term]) -> list[dict[str, Any]]:
    return [
        dict(part=term.part, what=term.what, formula=term.formula, numbers=term.amount.text, value=term.amount.value)
        for term in terms
    ]
