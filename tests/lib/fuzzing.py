"""Parsers fed with what nobody meant: changed copies of sound inputs, and bytes that are none.

An input that takes longer than `PATIENCE` is a finding, and so is an exception that the parser does not promise; it is made
shorter before it is told. Changes are drawn by Python's own generator: a library that draws them one by one takes ten times as
long as the parsers.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 3.0
"""Seconds of processor time that an input may take."""
MEMORY = 3 << 30
"""Bytes that parsers may take beyond what the process has at the beginning."""
PIECES = (
    b"[" * 3000, b'{"a":' * 1500, b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-1", b"0", b"18446744073709551616", b"null",
    b"true", b"[]", b"{}", b'""', b'"\\ud800"', b"\xff", b"\x00", b"\n", b"\r\n", b"../", b"\\", b'"', b",", b":", b"}", b"]",
    b"'", b"%", b"$", b"`", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"<think>", b"</think>",
)  # fmt: skip
"""What is put into copies of sound inputs."""
_DEEP = "\x00deep\x00"
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3.5, 1 << 31, 1 << 63, 10**30, 10**400, 1e308, float("nan"), float("inf"), "", "x", "\ud800",
    "\x1b[2J", "../x", "x" * 3000, [], {}, [[]], [{}], {"": None}, [None], ["x"], {"x": {}}, {"x": 1}, _DEEP,
)  # fmt: skip
"""What is put into the place of values of JSON."""


@dataclass(frozen=True)
class Parser:
    """A parser, and what it is fed with."""

    parse: Callable[[bytes], object]
    """raises nothing but `refuses`"""
    seeds: Sequence[bytes]
    """sound inputs; where one is JSON its values are changed too"""
    refuses: tuple[type[BaseException], ...] = (ValueError,)
    pieces: Sequence[bytes] = ()
    """further ones than `PIECES`, of the parser's own grammar"""


@dataclass
class Tally:
    """What came of a parser's inputs."""

    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    """seconds of processor time of one"""
    seconds: float = 0.0
    found: dict[str, str] = field(default_factory=dict)
    """kind -> the exception and an input"""


class _TooLong(BaseException):  # no parser is to catch it
    pass


def fuzz(parser: Parser, inputs: int, seed: int, kind: Callable[[BaseException], str]) -> Tally:
    """Feeds a parser with so many inputs.

    Args:
        kind: what tells findings apart; of each the first is told.
    """
    tally, draw, began = Tally(), random.Random(seed), time.monotonic()
    changes = Changes(draw, parser.seeds, (*PIECES, *parser.pieces))
    with _little_memory():
        for _ in range(inputs):
            data = changes.one()
            error, seconds = _fed(parser, data)
            tally.inputs += 1
            tally.slowest = max(tally.slowest, seconds)
            if error is None:
                continue
            if isinstance(error, parser.refuses):
                tally.refused += 1
            elif (known := kind(error)) not in tally.found:
                short = data if isinstance(error, _TooLong) else _shortened(parser, data, known, kind)
                tally.found[known] = f"{known}: {' '.join(str(error).split())[:200]} of {short[:300]!r}"
    tally.seconds = time.monotonic() - began
    return tally


def _fed(parser: Parser, data: bytes) -> tuple[BaseException | None, float]:
    start = time.process_time()
    try:
        with _alarm():
            parser.parse(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return error, time.process_time() - start
    return None, time.process_time() - start


def _shortened(parser: Parser, data: bytes, known: str, kind: Callable[[BaseException], str]) -> bytes:
    """An input without parts that the finding does not need."""
    size, until = len(data) // 2, time.monotonic() + 10 * PATIENCE
    while size and time.monotonic() < until:
        for at in range(0, len(data), size):
            error, _ = _fed(parser, shorter := data[:at] + data[at + size :])
            if error is not None and not isinstance(error, parser.refuses) and kind(error) == known:
                data = shorter
                break
        else:
            size //= 2
    return data


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _TooLong(f"more than {PATIENCE} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    with open("/proc/self/statm") as told:
        held = int(told.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Changes:
    """Random bytes, seeds with bytes changed, and where a seed is JSON with values changed."""

    def __init__(self, draw: random.Random, seeds: Sequence[bytes], pieces: Sequence[bytes]):
        self._draw, self._seeds, self._pieces = draw, seeds, pieces
        self._documents = [document for seed in seeds if (document := _document(seed)) is not None]

    def one(self) -> bytes:
        """Another input."""
        chance = self._draw.random()
        if chance < 0.05:
            return self._draw.randbytes(self._draw.randrange(80))
        return self._values() if self._documents and chance < 0.55 else self._bytes()

    def _bytes(self) -> bytes:
        draw = self._draw
        data = bytearray(draw.choice(self._seeds))
        for _ in range(draw.randint(1, 4)):
            at, length = draw.randint(0, len(data)), draw.randint(0, 12)
            match draw.randint(0, 5):
                case 0:
                    data[at : at + 1] = draw.randbytes(1)
                case 1 | 2:
                    data[at : at + length] = draw.choice(self._pieces)
                case 3:
                    del data[at : at + length]
                case 4:
                    data[at:at] = data[at : at + 8 * length] * draw.choice((1, 2, 50))
                case 5:
                    other = draw.choice(self._seeds)
                    data[at:] = other[draw.randint(0, len(other)) :]
        return bytes(data)

    def _values(self) -> bytes:
        draw = self._draw
        document = copy.deepcopy(draw.choice(self._documents))
        for _ in range(draw.randint(1, 3)):
            if not (places := list(_places(document))):
                break
            holder, key = draw.choice(places)
            match draw.randint(0, 4):
                case 0 if isinstance(holder, dict):
                    holder["".join(draw.choices("ab\x00é\ud800_.0", k=draw.randint(0, 3)))] = holder.pop(key)
                case 1:
                    del holder[key]
                case _:
                    holder[key] = copy.deepcopy(draw.choice(ODD))
        return json.dumps(document).replace(json.dumps(_DEEP), "[" * 1500 + "]" * 1500).encode()


def _document(seed: bytes) -> Any:
    with contextlib.suppress(ValueError):
        found = json.loads(seed)
        return found if isinstance(found, dict | list) and found else None
    return None


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder and key of a document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield value, key
        yield from _places(inner)
