"""Answers a test's calls in the judged program's process.

The program shares this process, so nothing that leaves it is trusted: it is here to be convenient, not to be honest.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
from collections.abc import Coroutine, Iterator
from typing import Any

from . import values


class Server:
    """Answers calls of names and objects of the program.

    Args:
        names: the program's globals.
        channel: descriptor to the test's process.
    """

    def __init__(self, names: dict[str, Any], channel: int):
        self._names, self._channel = names, channel
        self._held: list[Any] = []
        self._numbers: dict[int, int] = {}

    def say(self, message: list) -> None:
        rest = memoryview(values.pack(message))
        while rest:
            rest = rest[os.write(self._channel, rest) :]

    def hear(self) -> list:
        """The next message; ends the process where there will be none."""
        (length,) = struct.unpack("<I", self._exactly(4))
        return values.unpack(self._exactly(length))

    def _exactly(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            part = os.read(self._channel, min(length - len(parts), 1 << 20))
            if not part:
                os._exit(0)
            parts += part
        return bytes(parts)

    def serve(self) -> None:
        """Answers until the test ends."""
        while True:
            self._answer(self.hear())

    def _answer(self, asked: list) -> None:
        try:
            answer = self._do(asked)
        except values.Untold as untold:
            answer = ["untold", str(untold)[:200]]
        except BaseException as error:
            answer = failure(error, values.Encoder(self.tell))
        self.flush()
        try:
            self.say(answer)
        except values.Untold as untold:
            self.say(["untold", str(untold)])

    def flush(self) -> None:
        with contextlib.suppress(Exception):
            sys.stdout.flush()

    def _do(self, asked: list) -> list:
        match asked:
            case ["name", str(name)]:
                return self._name(name)
            case ["call", target, list(arguments), dict(named)]:
                return self._call(target, arguments, named)
            case ["get", target, str(name)]:
                return self._kind(getattr(self._target(target), name))
            case ["next", int(number)]:
                try:
                    return ["item", self._encode(next(self._held[number]))]
                except StopIteration:
                    return ["end"]
            case ["await", int(number)]:
                import asyncio

                return ["item", self._encode(asyncio.run(self._held[number]))]
        raise values.Malformed("unknown question")

    def _name(self, name: str) -> list:
        if name not in self._names:
            return ["none"]
        return self._kind(self._names[name])

    def _kind(self, value: Any) -> list:
        if isinstance(value, type):
            return ["class", self._hold(value), [base.__name__ for base in value.__mro__]]
        if callable(value):
            return ["function", self._hold(value)]
        return ["value", self._encode(value)]

    def _target(self, target: list) -> Any:
        return self._names[target[1]] if target[0] == "m" else self._held[target[1]]

    def _call(self, target: list, arguments: list, named: dict[str, Any]) -> list:
        kept: list = []
        decode = values.Decoder(self._make, kept, keep=True)
        positional = [decode(argument) for argument in arguments]
        keywords = {name: decode(argument) for name, argument in named.items()}
        known = {id(container): number for number, container in enumerate(kept)}
        before = self._contents(kept, known)
        callee = self._target(target)
        try:
            result = callee(*positional, **keywords)
            if isinstance(callee, type) and type(result) is callee and not self._is_data(result):
                answer = ["object", self._hold(result)]
            else:
                answer = ["value", values.Encoder(self.tell, known)(result)]
        except values.Untold:
            raise
        except BaseException as error:
            answer = failure(error, values.Encoder(self.tell))
        after = self._contents(kept, known)
        return [*answer, [[number, new] for number, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]]

    def _contents(self, kept: list, known: dict[int, int]) -> list:
        return [values.Encoder(self.tell, known)(container, inline=True) for container in kept]

    def _is_data(self, value: Any) -> bool:
        try:
            self._encode(value)
        except values.Untold:
            return False
        return not callable(value) and not isinstance(value, Iterator)

    def _hold(self, value: Any) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._held)
            self._held.append(value)
        return self._numbers[id(value)]

    def _encode(self, value: Any) -> Any:
        return values.Encoder(self.tell)(value)

    def tell(self, value: Any) -> list:
        if isinstance(value, Iterator):
            return ["g", self._hold(value)]
        if isinstance(value, Coroutine):
            return ["w", self._hold(value)]
        if id(value) in self._numbers or (callable(value) and not isinstance(value, type)):
            return ["h", self._hold(value)]
        raise values.Untold(f"an object of type {type(value).__name__}")

    def _make(self, told: list) -> Any:
        match told:
            case ["m", str(name)]:
                return self._names[name]
            case ["h", int(number)]:
                return self._held[number]
            case ["k", int(number)]:
                return lambda *arguments, **named: self._ask(number, arguments, named)
            case ["y", int(number)]:
                return self._items(number)
        raise values.Malformed("unknown value")

    def _items(self, number: int) -> Iterator[Any]:
        while True:
            try:
                item = self._ask(number, (), {})
            except StopIteration:
                return
            yield item

    def _ask(self, number: int, arguments: tuple, named: dict[str, Any]) -> Any:
        """Calls a function that the test gave."""
        told = [self._encode(argument) for argument in arguments]
        self.flush()
        self.say(["ask", number, told, {name: self._encode(argument) for name, argument in named.items()}])
        while True:
            answer = self.hear()
            match answer:
                case ["value", told]:
                    return values.Decoder(self._make)(told)
                case ["raise", list(names), list(arguments)]:
                    raise _exception(names, [values.Decoder(self._make)(argument) for argument in arguments])
            self._answer(answer)  # the function calls the program in turn


def _exception(names: list[str], arguments: list) -> BaseException:
    import builtins

    kinds = [getattr(builtins, name, None) for name in names]
    kind = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseException)), Exception)
    return kind(*arguments)


def failure(error: BaseException, encode: values.Encoder) -> list:
    """An exception as the names of its class and of those that it comes from, and its arguments."""
    try:
        arguments = [encode(argument) for argument in error.args]
    except Exception:
        arguments = [str(error)[:1000]]
    return ["raise", [base.__name__ for base in type(error).__mro__], arguments, f"{type(error).__name__}: {error}"[:300]]
