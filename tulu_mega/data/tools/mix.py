"""`tulu-mega data mix`: what `data.train` draws, as one file."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from tulu_mega.config import DataMixSettings
from tulu_mega.data.forms.reading import form_name
from tulu_mega.data.json_text import told
from tulu_mega.data.sources import Rows, load_rows
from tulu_mega.data.tools.row_kind import of_its_kind
from tulu_mega.errors import UserError

_SHOWN = 5


def mix(settings: DataMixSettings) -> None:
    """Writes the drawn rows in order, JSONL's as they lie there, and beside them what was drawn: OUTPUT.sources.json.

    Raises:
        UserError: sources or amounts are not to be used, a row is no JSON object, or the output cannot be written.
    """
    settings = of_its_kind(settings)
    data, output = settings.data, Path(settings.output).expanduser()
    rows = drawn(settings)
    partial = output.with_name(f".{output.name}.partial")
    changed: Counter[str] = Counter()
    forms: Counter[str] = Counter()
    try:
        try:
            with open(partial, "wb") as file:
                for index in range(len(rows)):
                    try:
                        forms[form_name(rows.row(index), "pair" if settings.pairs else "conversation", data.format)] += 1
                        line = rows.raw(index, changed)
                    except ValueError as error:
                        raise UserError(f"{rows.where(index)}: {error}") from None
                    file.write(line + b"\n")
            # what was drawn is written first: an output without it would not say where it is from
            origin = {"seed": data.seed, "sources": rows.sources()}
            output.with_name(f"{output.name}.sources.json").write_text(json.dumps(origin, indent=1, ensure_ascii=False) + "\n")
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output = {settings.output}: cannot be written: {error.strerror or error}") from None
    for source in rows.sources():
        amount = "all" if source["amount"] is None else source["amount"]
        print(f"{source['source']}: {source['drawn']:,} rows ({amount} of {source['rows']:,})")
    if forms.keys() != {"messages"}:
        print(f"forms of rows: {', '.join(f'{name} ({count:,} rows)' for name, count in forms.most_common())}")
    for what in told(changed):
        print(f"warning: {what}", file=sys.stderr)
    print(f"{output}: {len(rows):,} rows")


def drawn(settings: DataMixSettings) -> Rows:
    """Open the rows that settings draw, once ``pairs`` is set.

    Raises:
        UserError: sources or amounts are not to be used.
    """
    data = settings.data
    return load_rows(data.train, data.split, data.seed)


def check(rows: Rows) -> None:
    """Check that each row is a JSON object.

    Raises:
        UserError: with the first rows that are none.
    """
    problems: list[str] = []
    for index in range(len(rows)):
        try:
            rows.row(index)
        except ValueError as error:
            problems.append(f"{rows.where(index)}: {error}")
        if len(problems) == _SHOWN:
            problems.append("reading stopped here; later rows may be bad too")
            break
    if problems:
        raise UserError(problems)
