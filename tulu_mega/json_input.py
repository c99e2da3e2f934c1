"""JSON that somebody else wrote, or a crash tore: read, or refused by `ValueError` and nothing else.

Python's `json` ends in a RecursionError where brackets are nested deeply, and takes the last of two entries of one name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def read_json_text(text: str | bytes) -> Any:
    """What JSON says, as `json.loads` reads it.

    Raises:
        ValueError: it is no JSON, is nested more deeply than Python's parser goes, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def parse_json(data: bytes) -> Any:
    """What JSON in UTF-8 says, without names that an object has twice.

    Raises:
        ValueError: as `read_json_text`, or an object has a name twice.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has {name[:100]!r} twice")
        found[name] = value
    return found
