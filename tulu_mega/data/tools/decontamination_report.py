"""What `tulu-mega data decontaminate` tells on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REPORT = "report.json"
MATCHES = "matches.jsonl"
_DONE = {"keep": "kept", "clean": "cleaned", "drop": "dropped", "report": "reported only"}


def print_report(report: dict[str, Any], output: Path) -> None:
    """Writes to the terminal what was found in which set, what was done with it, and what to train on now."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tulu_mega.data.tools.tables import print_table

    console = Console(highlight=False)
    over = f"{report['ngram']}-grams, over {report['threshold']:.0%} of an evaluation row in one training row"
    console.print(over, markup=False, soft_wrap=True)
    sizes = {entry["source"]: entry["rows"] for entry in report["evaluations"]}
    for entry in report["sets"]:
        told = f"{entry['rows']:,} rows, {entry['contaminated']:,} contaminated: {_DONE[entry['action']]}, {entry['left']:,} left"
        console.print(f"\n{entry['source']}: {told}", markup=False, soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("rows held", "share", "contaminated"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("evaluation", no_wrap=True)
        for name, found in entry["evaluations"].items():
            share = f"[bold red]{found['share']:.2%}[/]" if found["over"] else f"{found['share']:.2%}"
            table.add_row(f"{found['held']:,} of {sizes[name]:,}", share, f"{found['contaminated']:,}", escape(name))
        print_table(table, console)
    short = [f"{entry['short']:,} rows of {entry['source']}" for entry in report["evaluations"] if entry["short"]]
    if short:
        told = f"shorter than {report['ngram']} words, so never found: {', '.join(short)}"
        console.print(told, markup=False, soft_wrap=True)
    unread = [f"{entry['unread']:,} rows of {entry['source']}" for entry in report["sets"] if entry["unread"]]
    if unread:
        told = f"could not be read, so nothing was looked for in them: {', '.join(unread)}"
        console.print(told, markup=False, soft_wrap=True)
    use = [entry["use"] for entry in report["sets"] if entry["use"]]
    console.print(
        f"{output / REPORT}, {output / MATCHES}\ndata.train = {json.dumps(use, ensure_ascii=False)}", markup=False, soft_wrap=True
    )
