"""A test's end of the channel to the judged program's process. It trusts nothing in the answers: they are data."""

from __future__ import annotations

import builtins
import os
import select
import struct
import sys
from collections.abc import Iterator
from typing import Any

from . import values
from .stubs import Awaited, Instance, Over, Raised, Returned, Stream, Stub

_SIZES = {"value": 2, "object": 2, "raise": 4, "class": 3, "function": 2, "none": 1, "item": 2, "end": 1, "ask": 4}
_POWERS = frozenset(
    "eval exec compile open input breakpoint globals locals vars dir getattr setattr delattr __import__ __build_class__".split()
)
_POWERFUL = frozenset(
    "os posix sys io _io gc inspect ctypes _ctypes subprocess shutil importlib pathlib signal runpy code".split()
)
"""Functions through which the program could act in the test's process if the test passed one on."""
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))


class Client:
    """Asks the program's process.

    Args:
        channel: to its answering code.
        output: what it prints; does not block.
        output_mb: how much of that, in MiB, a test allows.
    """

    def __init__(self, channel: int, output: int, output_mb: int):
        self._channel, self._output, self._output_mb = channel, output, output_mb
        self._printed = 0
        self._given: list[Any] = []
        self._exceptions: dict[str, type[BaseException]] = {}
        self._instances: dict[int, Instance] = {}
        self.asked = 0
        """Number of questions that may have changed the program's state: all but those for a name."""
        self.trouble: tuple[str, str] | None = None
        """Kind and words of the first thing that ends the test, whatever the test makes of it."""

    def over(self, kind: str, detail: str) -> Over:
        if self.trouble is None:
            self.trouble = kind, detail
        return Over(detail)

    def tampered(self, what: object) -> Over:
        return self.over("tampered", f"the program's process sent a malformed answer: {what}")

    def hear_start(self) -> None:
        """Waits until the program's own code has run."""
        try:
            message = self._hear()
        except values.Malformed as malformed:
            raise self.tampered(malformed) from None
        match message:
            case ["ready"]:
                return
            case ["raise", [str(name), *_], _, str(text)]:
                raise self.over("memory" if name == "MemoryError" else "error", text[:300])
        raise self.tampered("its first message")

    def ask(self, question: list, kept: list | None = None) -> list:
        """An answer of the right length; exceptions of the program are raised as the built-in ones that they come from.

        Args:
            kept: the containers among the arguments, which get the contents that the program left them with.
        """
        self.asked += question[0] != "name"
        try:
            self._say(question)
            while (answer := self._answer(kept))[0] == "ask":
                self._say(self._called(*answer[1:]))
            error = self._exception(*answer[1:]) if answer[0] == "raise" else None
        except values.Malformed as malformed:
            raise self.tampered(malformed) from None
        except MemoryError:
            raise self.over("memory", "what the program gave does not fit into the test's memory") from None
        if error is not None:
            raise error
        return answer

    def _answer(self, kept: list | None) -> list:
        answer = self._hear()
        if answer[0] == "untold":
            raise self.over("unserved", f"the program gave {str(answer[-1])[:200]}, which does not go over to a test")
        size = _SIZES.get(answer[0])
        if kept is not None and size and answer[0] != "ask" and len(answer) == size + 1:
            self._change(kept, answer.pop())
        if len(answer) != size:
            raise values.Malformed("a message of another length")
        return answer

    def call(self, target: list, arguments: tuple, named: dict[str, Any]) -> tuple[list, list]:
        """The answer to a call, and the containers among its arguments."""
        kept: list[Any] = []
        encode = values.Encoder(self._tell, keep=kept)
        try:
            question = ["call", target, [encode(value) for value in arguments], {name: encode(named[name]) for name in named}]
            return self.ask(question, kept), kept
        except values.Untold as untold:
            raise self.over("unserved", f"the test gives the program {untold}, which does not go over") from None

    def value(self, told: Any, known: list | None = None) -> Any:
        try:
            return values.Decoder(self._make, known)(told)
        except values.Malformed as malformed:
            raise self.tampered(malformed) from None
        except MemoryError:
            raise self.over("memory", "what the program gave does not fit into the test's memory") from None

    def _change(self, kept: list, changes: Any) -> None:
        decode, new = values.Decoder(self._make, kept), []
        for change in changes if type(changes) is list else [None]:
            match change:
                case [int(number), [str(tag), *_] as told] if 0 <= number < len(kept) and tag == values.tag_of(kept[number]):
                    new.append((kept[number], tag, told[1:] if tag == "B" else decode.contents(told)))
                case _:
                    raise values.Malformed("changes of arguments")
        for container, tag, parts in new:
            try:
                values.fill(container, tag, parts)
            except (TypeError, ValueError, LookupError):
                raise values.Malformed("changes of arguments") from None

    def _called(self, number: Any, arguments: Any, named: Any) -> list:
        """Calls a function that the test gave to the program."""
        known = type(number) is int and 0 <= number < len(self._given)
        if not known or type(arguments) is not list or type(named) is not dict:
            raise values.Malformed("a call")
        decode = values.Decoder(self._make)
        positional = [decode(argument) for argument in arguments]
        keywords = {name: decode(value) for name, value in named.items()}
        try:
            return ["value", values.Encoder(self._tell)(self._given[number](*positional, **keywords))]
        except Over:
            raise
        except values.Untold as untold:
            raise self.over("unserved", f"the test gives the program {untold}, which does not go over") from None
        except AssertionError as error:  # the program could catch what the test finds wrong
            raise self.over("wrong", f"AssertionError: {error}"[:300] if str(error) else "AssertionError") from None
        except BaseException as error:
            return ["raise", [kind.__name__ for kind in type(error).__mro__], [str(part) for part in error.args]]

    def _exception(self, names: Any, arguments: Any, text: Any) -> BaseException:
        if type(names) is not list or not all(type(name) is str for name in names):
            raise values.Malformed("an exception")
        if type(arguments) is not list or type(text) is not str:
            raise values.Malformed("an exception")
        own = names and names[0] not in builtins.__dict__ and len(self._exceptions) < 100
        kind = self.new_exception(names[0], names[1:]) if own else self._exception_class(names)
        if issubclass(kind, (StopIteration, StopAsyncIteration)):  # would end a loop of the test as if all were compared
            kind = RuntimeError
        decode = values.Decoder(self._make)
        told = [decode(argument) for argument in arguments[:10]]
        try:
            error = type.__call__(kind, *told)
        except Exception:
            error = Exception(text[:300])
        error.__dict__["told"] = text[:300]
        return error

    def _exception_class(self, names: list[str]) -> type[BaseException]:
        """The first that is known here, of an exception's class and those that it comes from."""
        for name in names:
            known = self._exceptions.get(name) or builtins.__dict__.get(name)
            if isinstance(known, type) and issubclass(known, BaseException):
                return known
        return Exception

    def new_exception(self, name: str, bases: list[str]) -> type[BaseException]:
        """A class for an exception that the program defines and the test names."""
        if name not in self._exceptions:
            self._exceptions[name] = Raised(name, (self._exception_class(bases),), {"client": self})
        return self._exceptions[name]

    def instance(self, number: int) -> Instance:
        """The object of the program behind a number."""
        return self._instances.setdefault(number, Instance(self, ["h", number]))

    def _tell(self, value: Any) -> list:
        if type(value) in (Stub, Instance, Returned):
            return object.__getattribute__(value, "_target")
        if type(value) in _VIEWS:
            return values.Encoder(self._tell)(list(value))
        if isinstance(value, Iterator):
            self._given.append(value.__next__)
            return ["y", len(self._given) - 1]
        if callable(value):
            home, name = getattr(value, "__module__", ""), getattr(value, "__name__", "")
            if home in _POWERFUL or (home == "builtins" and name in _POWERS):
                raise values.Untold(f"{name}, with which it would reach into the test's process")
            self._given.append(value)
            return ["k", len(self._given) - 1]
        raise values.Untold(f"an object of type {type(value).__name__}")

    def _make(self, told: list) -> Any:
        match told:
            case ["h", int(number)] if number in self._instances:
                return Returned(self, ["h", number])
            case ["h", int(number)]:
                return Stub(self, ["h", number], "")
            case ["g", int(number)]:
                return Stream(self, number)
            case ["w", int(number)]:
                return Awaited(self, number)
        raise values.Malformed("an unknown tag")

    def _say(self, message: list) -> None:
        rest = memoryview(values.pack(message))
        while rest:
            self._wait(select.POLLOUT)
            try:
                rest = rest[os.write(self._channel, rest[:4096]) :]
            except OSError:
                raise self._left() from None

    def _hear(self) -> list:
        (length,) = struct.unpack("<I", self._exactly(4))
        if length > values.MOST_BYTES:
            raise values.Malformed("a message that is too long")
        message = values.unpack(self._exactly(length))
        self._print()
        return message

    def _exactly(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            self._wait(select.POLLIN)
            try:
                part = os.read(self._channel, min(length - len(parts), 1 << 20))
            except OSError:
                part = b""
            if not part:
                raise self._left()
            parts += part
        return bytes(parts)

    def _left(self) -> Over:
        return self.over("left", "the program left before the test was through")

    def _wait(self, event: int) -> None:
        """Wait until the channel can be read or written, and copy output meanwhile, so that the program never waits for a
        reader."""
        poll = select.poll()
        poll.register(self._channel, event)
        poll.register(self._output, select.POLLIN)
        while self._channel not in (found := dict(poll.poll())):
            if found and not self._print():
                poll.unregister(self._output)

    def _print(self) -> bool:
        """Copy the program's output to the test's standard output; return whether more may come."""
        while True:
            try:
                part = os.read(self._output, 1 << 16)
            except BlockingIOError:
                return True
            if not part:
                return False
            self._printed += len(part)
            if self._printed > self._output_mb << 20:
                raise self.over("output", f"printed more than {self._output_mb} MiB")
            sys.stdout.write(part.decode("utf-8", "replace"))
