"""Rows as lines of JSON that every reader takes."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
import re
import uuid
from collections import Counter
from typing import Any

NO_NUMBER = "NaN or infinity, written as null"
_AS_TEXT = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)  # a datetime is a date
_SURROGATE = re.compile("[\ud800-\udfff]")
NO_TEXT = "bytes that are no text, written in base64"


def json_line(value: Any, changed: Counter[str] | None = None) -> bytes:
    """A value as one line of JSON (RFC 8259) in UTF-8, without its end.

    JSON has no NaN and no infinity: both become null, as pandas writes them. Bytes become the text that they encode, or base64
    where they encode none. Dates, times and decimals become text.

    Args:
        changed: is told how often what could not be written as it was: "COLUMN: NaN or infinity, written as null".

    Raises:
        ValueError: it holds something else, such as an image.

    >>> json_line({"score": float("nan"), "note": "é"}).decode()
    '{"score": null, "note": "é"}'
    """
    text = _dumped(value, changed)
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can write
        return json.dumps(json.loads(text)).encode()


def readable_line(value: Any) -> str:
    """The same for files that people and other programs read: a lone surrogate, whose escape many of these refuse, becomes text.

    >>> readable_line({"note": "\\ud800é"})
    '{"note": "\\\\\\\\ud800é"}'
    """
    return _SURROGATE.sub(lambda found: f"\\\\u{ord(found[0]):04x}", _dumped(value, None))


def _dumped(value: Any, changed: Counter[str] | None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_written)
    except (TypeError, ValueError):  # looked for only then, since it takes several times as long
        plain = _plain(value, "", Counter() if changed is None else changed)
        try:
            return json.dumps(plain, ensure_ascii=False, default=_written)
        except TypeError as error:
            raise ValueError(str(error)) from None


def strict_line(line: bytes, changed: Counter[str] | None = None) -> bytes:
    """A line that Python reads as JSON, as it lies; written anew where it has NaN or an infinity, which others do not read.

    Raises:
        ValueError: Python does not read it.
    """
    if not any(word in line for word in (b"NaN", b"Infinity")):
        return line
    found: list[str] = []
    try:
        value = json.loads(line, parse_constant=lambda word: found.append(word) or math.nan)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    return json_line(value, changed) if found else line  # else it is text


def told(changed: Counter[str]) -> list[str]:
    """What was changed, for messages."""
    return [f"{what} ({count:,} times)" for what, count in changed.items()]


def _written(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode()  # UnicodeDecodeError is a ValueError
    if not isinstance(value, _AS_TEXT):
        raise TypeError(f"a {type(value).__name__} cannot be written as JSON")
    return str(value)


def _plain(value: Any, column: str, changed: Counter[str]) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner, column or str(key), changed) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, column, changed) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        changed[f"{column}: {NO_NUMBER}"] += 1
        return None
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            changed[f"{column}: {NO_TEXT}"] += 1
            return base64.b64encode(bytes(value)).decode()
    return value
