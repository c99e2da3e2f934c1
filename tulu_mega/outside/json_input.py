"""JSON that somebody else wrote, or a crash tore: read, or refused by `ValueError` and nothing else.

Python's `json` ends in a RecursionError where brackets are nested deeply, and takes the last of two entries of one name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any


class NameTwice(ValueError):
    """An object has a name twice."""


def read_json_text(text: str | bytes) -> Any:
    """What JSON says, as `json.loads` reads it.

    Raises:
        ValueError: it is no JSON, is nested more deeply than Python's parser goes, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def read_whole_json(text: str | bytes) -> Any:
    """What JSON of a user's data says; a name that an object has twice is refused, since only one of the two could be used.

    Raises:
        ValueError: as `read_json_text`; NameTwice, which is one, where an object has a name twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def parse_json(data: bytes) -> Any:
    """What JSON in UTF-8 says, without names that an object has twice.

    Raises:
        ValueError: as `read_json_text`, or an object has a name twice.
    """
    return read_whole_json(data.decode("utf-8"))


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _value in pairs)
        raise NameTwice(f"it has {counts.most_common(1)[0][0][:100]!r} twice")
    return found
