"""Values between a test and the judged program: plain JSON with tags, read strictly.

None, bool, int, finite float and str are JSON's own; everything else is a list that starts with a tag. Only values whose type
is exactly a built-in one go over (and some plain ones of the standard library, each under its own tag), so whatever comes back
compares as Python's own types do. A subclass, or any other object, is refused by name.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

MOST_BYTES = 16 << 20
"""Most bytes of a message."""
MOST_DEPTH = 100
_PLAIN_INT = 1 << 63
_SEQUENCES = {list: "l", tuple: "t", set: "s", frozenset: "f"}
MUTABLE = {"l", "s", "d", "B", "q", "C", "O", "D"}
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Untold(Exception):
    """Raised for a value whose type is not sent."""


class Malformed(Exception):
    """Raised for bytes that are no valid message."""


class Encoder:
    """Values as JSON.

    Args:
        known: identity -> number of containers that both sides hold already.
        keep: number containers as they are met (those of arguments, whose changes come back).
        special: gives the tagged form of values that are no data (functions, iterators), or raises Untold.
    """

    def __init__(self, special: Callable[[Any], list], known: dict[int, int] | None = None, keep: list | None = None):
        self._special, self._known, self._keep = special, dict(known or {}), keep

    def __call__(self, value: Any, depth: int = 0, inline: bool = False) -> Any:
        """
        Args:
            inline: write this container out although its number is known.

        Raises:
            Untold: of the value, or of one within.
        """
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -_PLAIN_INT <= value < _PLAIN_INT else ["i", hex(value)]
        if kind is float:
            return value if math.isfinite(value) else ["n", str(value)]
        if depth > MOST_DEPTH:
            raise Untold(f"a value nested more than {MOST_DEPTH} deep")
        if not inline and id(value) in self._known:
            return ["r", self._known[id(value)]]
        tag = _SEQUENCES.get(kind) or _tag(value, kind)
        if tag in MUTABLE and self._keep is not None and not inline:
            self._known[id(value)] = len(self._keep)
            self._keep.append(value)
        if tag is None:
            return self._special(value)
        return [tag, *(self(part, depth + 1) for part in _parts(tag, value))]


def _tag(value: Any, kind: type) -> str | None:
    if kind is dict:
        return "d"
    simple = {bytes: "b", bytearray: "B", complex: "c", range: "R"}.get(kind)
    if simple:
        return simple
    for module, name, tag in _LIBRARY:
        if module in sys.modules and kind is getattr(sys.modules[module], name, None):
            return tag
    if issubclass(kind, tuple) and kind.__bases__ == (tuple,) and type(getattr(kind, "_fields", None)) is tuple:
        return "N"
    if (
        kind.__module__ == "numpy"
        and getattr(value, "ndim", None) == 0
        and type(value.item()) in (bool, int, float, complex, str)
    ):
        return "#"
    return None


_LIBRARY = (
    ("collections", "Counter", "C"),
    ("collections", "OrderedDict", "O"),
    ("collections", "defaultdict", "D"),
    ("collections", "deque", "q"),
    ("fractions", "Fraction", "F"),
    ("decimal", "Decimal", "E"),
    ("datetime", "date", "Y"),
    ("datetime", "datetime", "T"),
    ("datetime", "timedelta", "A"),
)


def _parts(tag: str, value: Any) -> Iterator[Any]:
    match tag:
        case "l" | "t" | "s" | "f":
            yield from list(value)
        case "q":
            yield value.maxlen
            yield from list(value)
        case "d" | "C" | "O" | "D":
            for key, item in list(value.items()):
                yield key
                yield item
        case "b" | "B":
            yield value.hex()
        case "c":
            yield value.real
            yield value.imag
        case "R":
            yield from (value.start, value.stop, value.step)
        case "F":
            yield from (value.numerator, value.denominator)
        case "E":
            yield str(value)
        case "Y" | "T":
            if getattr(value, "tzinfo", None) is not None:
                raise Untold("datetime with a time zone")
            yield value.isoformat()
        case "A":
            yield from (value.days, value.seconds, value.microseconds)
        case "N":
            if any(map(callable, value)):  # f(x).isdigit() would be the program's answer
                raise Untold("a named tuple with functions")
            yield type(value).__name__
            yield list(value._fields)
            yield from tuple(value)
        case "#":
            yield value.item()


class Decoder:
    """The inverse of :class:`Encoder`, which trusts nothing.

    Args:
        special: makes the value of a tag that is no data, from the list; raises Malformed for a tag that may not come.
        known: containers by number.
        keep: number containers as they come.
    """

    def __init__(self, special: Callable[[list], Any], known: list | None = None, keep: bool = False):
        self._special, self._known, self._keep = special, known if known is not None else [], keep

    def __call__(self, told: Any, depth: int = 0) -> Any:
        """
        Raises:
            Malformed: this is no value.
        """
        kind = type(told)
        if told is None or kind is bool or kind is str or kind is int or kind is float:
            return told
        if kind is not list or not told or type(told[0]) is not str or depth > MOST_DEPTH + 1:
            raise Malformed("no value")
        tag = told[0]
        try:
            return self._tagged(tag, told, depth)
        except (TypeError, ValueError, OverflowError, ArithmeticError, LookupError, AttributeError) as error:
            raise Malformed(f"no value: {type(error).__name__}") from None

    def _tagged(self, tag: str, told: list, depth: int) -> Any:
        match tag:
            case "r":
                return self._known[_whole(told[1])]
            case "i":
                return int(_text(told[1]), 16)
            case "n":
                return _NON_FINITE[told[1]]
        if tag in _CONTAINERS:
            made = _CONTAINERS[tag]() if tag != "q" else _deque(told[1])
            if self._keep:
                self._known.append(made)
            fill(made, tag, self.contents(told, depth))
            return made
        if tag in _IMMUTABLES:
            return _IMMUTABLES[tag](*self.contents(told, depth))
        if tag == "t":
            return tuple(self.contents(told, depth))
        if tag == "f":
            return frozenset(self.contents(told, depth))
        return self._special(told)

    def contents(self, told: list, depth: int = 0) -> list:
        return [self(part, depth + 1) for part in told[1:]]


def fill(container: Any, tag: str, parts: list) -> None:
    """Gives a container other contents, in place."""
    if tag == "l":
        container[:] = parts
    elif tag == "B":
        container[:] = bytes.fromhex(parts[0])
    elif tag == "s":
        container.clear()
        container.update(parts)
    elif tag == "q":
        if container.maxlen != parts[0]:
            raise ValueError("another length")
        container.clear()
        container.extend(parts[1:])
    else:
        container.clear()
        for place in range(0, len(parts), 2):
            container[parts[place]] = parts[place + 1]


def tag_of(container: Any) -> str:
    return _SEQUENCES.get(type(container)) or _tag(container, type(container)) or ""


def _collection(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import collections

        return getattr(collections, name)()

    return make


def _deque(longest: int | None) -> Any:
    import collections

    return collections.deque(maxlen=None if longest is None else _whole(longest))


def _fraction(numerator: int, denominator: int) -> Any:
    from fractions import Fraction

    return Fraction(_whole(numerator), _whole(denominator))


def _decimal(text: str) -> Any:
    from decimal import Decimal

    return Decimal(_text(text))


def _date(text: str) -> Any:
    import datetime

    return datetime.date.fromisoformat(_text(text))


def _datetime(text: str) -> Any:
    import datetime

    return datetime.datetime.fromisoformat(_text(text))


def _timedelta(days: int, seconds: int, microseconds: int) -> Any:
    import datetime

    return datetime.timedelta(_whole(days), _whole(seconds), _whole(microseconds))


def _named_tuple(name: str, fields: list, *parts: Any) -> Any:
    import collections

    if len(fields) > 100 or any(map(callable, parts)):
        raise ValueError("too many fields, or functions")
    return collections.namedtuple(_text(name), [_text(field) for field in fields])(*parts)


def _number(value: Any) -> Any:
    if type(value) in (bool, int, float, complex, str):
        return value
    raise ValueError("no number")


_CONTAINERS: dict[str, Callable[..., Any]] = {
    "l": list,
    "s": set,
    "d": dict,
    "B": bytearray,
    "q": _deque,
    "C": _collection("Counter"),
    "O": _collection("OrderedDict"),
    "D": _collection("defaultdict"),
}
_IMMUTABLES: dict[str, Callable[..., Any]] = {
    "b": lambda text: bytes.fromhex(_text(text)),
    "c": lambda real, imaginary: complex(_real(real), _real(imaginary)),
    "R": lambda start, stop, step: range(_whole(start), _whole(stop), _whole(step)),
    "F": _fraction,
    "E": _decimal,
    "Y": _date,
    "T": _datetime,
    "A": _timedelta,
    "N": _named_tuple,
    "#": _number,
}


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("no int")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("no text")
    return value


def _real(value: Any) -> float:
    if type(value) is not float:
        raise ValueError("no float")
    return value


def pack(message: list) -> bytes:
    """A message with its length before it.

    Raises:
        Untold: it is longer than what goes over.
    """
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MOST_BYTES:
        raise Untold(f"more than {MOST_BYTES >> 20} MiB")
    return struct.pack("<I", len(body)) + body


def unpack(body: bytes) -> list:
    """
    Raises:
        Malformed: no JSON list, or one that is nested too deeply.
    """

    def refuse(literal: str) -> None:
        raise Malformed(literal)

    try:
        message = json.loads(body.decode("ascii"), parse_constant=refuse)
    except (ValueError, RecursionError):
        raise Malformed("no JSON") from None
    if type(message) is not list or not message or type(message[0]) is not str:
        raise Malformed("no message")
    return message
