"""An inspection in the terminal and as a page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tulu_mega.data.tools.inspection import Inspection
from tulu_mega.data.tools.tables import print_table
from tulu_mega.errors import UserError, printable

_BAR = 50
_SHOWN = 1500
"""Characters of a run of text that the terminal shows; the page has them all."""


def print_inspection(found: Inspection, console: Console | None = None) -> None:
    """Writes to the terminal; where there are no colours, what is trained stands in ⟦ ⟧."""
    console = console or Console(highlight=False)
    begin, end = ("", "") if console.color_system else ("⟦", "⟧")
    for sample in found.samples:
        cut = f", {sample.cut:,} more cut off" if sample.cut else ""
        console.rule()  # without a title: a long path would be cut off before its line
        title = f"{escape(printable(sample.where))} · {sample.tokens:,} tokens, {sample.trained:,} trained{cut}"
        console.print(title, style="bold", soft_wrap=True)
        text = Text()
        for piece, trained in sample.pieces:
            shown = piece if len(piece) <= _SHOWN else f"{piece[:_SHOWN]} ... {len(piece) - _SHOWN:,} more characters"
            shown = printable(shown)
            text.append(f"{begin}{shown}{end}" if trained else shown, "black on green" if trained else "dim")
        console.print(text)
    console.rule("sources", align="left")
    print_table(_sources(found), console)
    if found.rejected:
        kinds = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in found.rejected.items())
        console.print(f"not used: {kinds}", style="bold red", soft_wrap=True)
        for reject in found.rejects:
            told = printable(f"{reject.source} {reject.line}: {reject.reason}")
            console.print(f"  {told}", markup=False, soft_wrap=True)
        if sum(found.rejected.values()) > len(found.rejects):
            console.print("  ...")
    for line in found.told:
        console.print(line, markup=False, soft_wrap=True)
    console.rule("lengths in tokens", align="left")
    most = max(rows for _, _, rows in found.lengths.histogram)
    for first, last, rows in found.lengths.histogram:
        console.print(f"{first:>7,} - {last:<7,} {'█' * round(_BAR * rows / most):<{_BAR}} {rows:,}", soft_wrap=True)
    for name, value in facts(found):
        console.print(f"{name:<14} {value}", markup=False, soft_wrap=True)


def write_page(found: Inspection, file: Path) -> None:
    """One HTML file that needs nothing else.

    Raises:
        UserError: it cannot be written.
    """
    environment = Environment(loader=PackageLoader("tulu_mega.data.tools", "."), autoescape=True, undefined=StrictUndefined)
    most = max(rows for _, _, rows in found.lengths.histogram)
    page = environment.get_template("inspect.html.j2").render(**asdict(found), facts=facts(found), most=most)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"html = {file}: cannot be written: {error.strerror or error}") from None
    print(f"page: {file}")


def facts(found: Inspection) -> list[tuple[str, str]]:
    """Figures with their names, as both views show them."""
    lengths, packing = found.lengths, found.packing
    least, mean, most = packing.micro_batches
    quantiles = " · ".join(f"{name} {value:,.0f}" for name, value in lengths.quantiles.items())
    truncated = f"{found.truncated:,} rows, {found.cut:,} tokens cut off at {found.max_length:,}" if found.truncated else "none"
    return [
        ("rows", f"{lengths.rows:,} used, {sum(found.rejected.values()):,} not used"),
        ("tokens", f"{lengths.tokens:,}, of which {lengths.trained:,} trained ({lengths.trained / lengths.tokens:.1%})"),
        ("length", quantiles),
        ("truncated", truncated),
        ("layout", f"{packing.layout} · at most {packing.capacity:,} tokens in a micro-batch"),
        ("steps", f"{packing.steps:,}, of which {packing.sampled:,} were packed for these figures"),
        ("micro-batches", f"{mean:.1f} on a rank in a step ({least} to {most}), {packing.sequences:.1f} sequences in each"),
        ("padding", f"{packing.padding[0]:.2%} of what is computed (worst step {packing.padding[1]:.2%})"),
        ("balance", f"{packing.balance[0]:.1%} of the ranks' time is work (worst step {packing.balance[1]:.1%})"),
    ]


def _sources(found: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("rows", "amount", "drawn", "used", "tokens", "source"):
        table.add_column(column, justify="left" if column == "source" else "right", no_wrap=True)
    for it in found.sources:
        amount = "all" if it["amount"] is None else str(it["amount"])
        table.add_row(f"{it['rows']:,}", amount, f"{it['drawn']:,}", f"{it['used']:,}", f"{it['tokens']:,}", escape(it["source"]))
    return table
