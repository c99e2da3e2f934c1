"""Tables in a terminal of any width, and in a file."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

_AS_WIDE_AS_IT_TAKES = 100_000


def print_table(table: Table, console: Console | None = None) -> None:
    """Prints a table at the width that its content needs.

    rich would break names and cut numbers off where a terminal, or the 80 columns that it takes a file for, is narrower; a
    terminal goes on in the next line instead. Names that may be long belong into the last column.
    """
    console = console or Console()
    needed = console.measure(table, options=console.options.update(max_width=_AS_WIDE_AS_IT_TAKES)).maximum
    kept, console.width = console.width, max(console.width, needed)
    try:
        console.print(table, soft_wrap=True)
    finally:
        console.width = kept
