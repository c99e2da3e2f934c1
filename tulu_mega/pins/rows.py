"""Training and held-out rows as pins: what was drawn of each source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tulu_mega.pins.record import Part, Pin


def pin(sources: Sequence[Mapping[str, Any]]) -> Pin:
    """The pin of rows. What the sources are called does not count, their order does.

    Args:
        sources: of :meth:`tulu_mega.data.sources.Rows.sources`.
    """
    parts = {f"source {number}": _part(source) for number, source in enumerate(sources, 1)}
    return Pin(", ".join(source["source"] for source in sources), parts)


def _part(source: Mapping[str, Any]) -> Part:
    amount, rows = source["amount"], source["rows"]
    drawn = f"{rows:,} rows" if amount is None else f"{amount!r}: {source['drawn']:,} of {rows:,} rows"
    content = [source["fingerprint"], repr(amount), source["drawn"]]
    return Part(f"{source['source']} ({drawn})", hashlib.sha256(json.dumps(content).encode()).hexdigest())
