"""A dry run for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from rich import box
from rich.console import Console, Group
from rich.table import Table

from tulu_mega.errors import UserError
from tulu_mega.plan.dry_run.record import DryRun, RankReport

_GIB = 2**30
_WIDTH = 96
"""Characters that all columns take; narrower terminals break lines rather than lose a column."""


def as_json(found: DryRun) -> dict[str, Any]:
    """Everything but the lists of parameters and of the checkpoint's boxes; sizes in bytes, lengths in elements."""
    whole = asdict(found) | {"layout": found.layout.sizes | {"world": found.layout.world}}
    whole["value"] = as_json(found.value) if found.value else None
    for told, report in zip(whole["ranks"], found.ranks, strict=True):
        del told["shards"], told["adapters"], told["stored"]
        told |= {"parameters": report.parameters, "parameter_bytes": report.parameter_bytes}
        if report.sending:
            told["sending"] |= {"tensors": len(report.sending.tensors), "bytes": report.sending.nbytes}
    return whole


def table(found: DryRun, whose: str = "") -> Group:
    """A row for each pipeline rank, the largest of its tensor ranks, and a line of what was looked at; the same of a value model
    below.

    Args:
        whose: stands behind "a rank", of one model of two.
    """
    trains = any(report.training for report in found.ranks)
    sends = any(report.sending for report in found.ranks)
    columns = ["stage", "layers", "elements (M)", "weights"]
    columns += ["gradients", "optimizer", "writes at a save"] if trains else []
    columns += ["to each engine", "its buffers"] if sends else []
    title = f"What a rank holds{whose}, writes and sends, GiB"
    drawn = Table(box=box.SIMPLE_HEAD, title=title, pad_edge=False, collapse_padding=True)
    for column in columns:  # a heading may break between words, not within
        drawn.add_column(column, justify="right", min_width=max(map(len, column.split())))
    for stage in range(found.layout.pipeline):
        drawn.add_row(*_row([report for report in found.ranks if report.stage == stage], trains, sends))
    return Group(drawn, summary(found), *([table(found.value, " of the value model")] if found.value else []))


def summary(found: DryRun) -> str:
    """One line."""
    layout = found.layout
    if found.problems:
        return f"{len(found.ranks)} distinct of {layout.world:,} ranks were built: {len(found.problems)} problems"
    return (
        f"{found.hf_parameters:,} parameters in {found.hf_tensors:,} tensors of transformers' model, each held once by "
        f"{len(found.ranks)} distinct of {layout.world:,} ranks (TP{layout.tensor} PP{layout.pipeline} VPP{layout.virtual} "
        f"CP{layout.context} DP{layout.data}); copies compared: {found.replicas}; nothing wrong found; {found.seconds:.0f} s, "
        f"{found.peak_bytes / _GIB:.2f} GiB"
    )


def _row(group: Sequence[RankReport], trains: bool, sends: bool) -> list[str]:
    first = group[0]
    largest = max(report.parameters for report in group)
    cells = [
        str(first.stage),
        " + ".join(map(str, first.layers)) if len(first.layers) < 5 else f"{sum(first.layers)} in {len(first.layers)}",
        f"{largest / 1e6:,.1f}",
        _gib(max(report.parameter_bytes + report.beside for report in group)),
    ]
    if trains:
        cells += [
            _gib(max(report.training.gradient_buffer for report in group)),
            _gib(max(report.training.optimizer_bytes for report in group)),
            _gib(max(report.weights_saved + report.optimizer_saved for report in group)),
        ]
    if sends:
        cells += [_gib(first.sending.nbytes), _gib(first.sending.buffers)]
    return cells


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f}"


def tell(found: DryRun, format: Literal["table", "json"] = "table") -> None:
    """Writes it to standard output.

    Raises:
        UserError: with the dry run's problems, after all else.
    """
    if format == "json":
        print(json.dumps(as_json(found), indent=2))
    else:
        console = Console()
        console.print(table(found), width=max(console.width, _WIDTH), crop=False)
    if found.problems:
        raise UserError(found.problems)
