"""Stand-ins in a test for the program's functions, objects and iterators."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any, Protocol


class Over(BaseException):
    """Raised when the test has failed for good. A bare ``except`` of the test does not save it: see ``Client.trouble``."""


class Client(Protocol):
    """The channel through which a stub calls the program's process."""

    def over(self, kind: str, detail: str) -> Over: ...

    def tampered(self, what: object) -> Over: ...

    def ask(self, question: list, kept: list | None = None) -> list: ...

    def call(self, target: list, arguments: tuple, named: dict[str, Any]) -> tuple[list, list]: ...

    def value(self, told: Any, known: list | None = None) -> Any: ...

    def instance(self, number: int) -> Instance: ...


class _Refusing:
    """Refuses operations that no object of the program may decide for a test: truth, equality, order."""

    _client: Client
    _target: list

    def _refuse(self, what: str) -> Over:
        return self._client.over("unserved", f"the test needs {what} of an object of the program, which stays there")

    def __bool__(self) -> bool:
        raise self._refuse("the truth")

    def __eq__(self, other: object) -> bool:
        raise self._refuse("the equality")

    __ne__ = __eq__

    def __lt__(self, other: object) -> bool:
        raise self._refuse("the order")

    __le__ = __gt__ = __ge__ = __lt__

    def __hash__(self) -> int:
        raise self._refuse("the hash")

    def __str__(self) -> str:
        raise self._refuse("the text")

    __repr__ = __str__

    def __format__(self, form: str) -> str:
        raise self._refuse("the text")

    def __add__(self, other: object = None) -> Any:
        raise self._refuse("arithmetic")

    __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __floordiv__ = __mod__ = __matmul__ = __pow__ = __add__
    __and__ = __or__ = __xor__ = __neg__ = __abs__ = __int__ = __float__ = __add__


class Stub(_Refusing):
    """A function or class of the program. It can be called; what comes back is data, a function or an iterator.

    Args:
        objects: whether calling it may give an :class:`Instance`.
        closed: it is a class whose objects are not served.
    """

    def __init__(self, client: Client, target: list, name: str, objects: bool = False, closed: bool = False):
        self._client, self._target, self._objects, self._closed, self._name = client, target, objects, closed, name

    @property
    def __name__(self) -> str:
        if not self._name:
            raise self._refuse("the name")
        return self._name

    def __str__(self) -> str:
        if not self._name:
            raise self._refuse("the text")
        return f"<{self._name} of the program>"

    __repr__ = __str__
    __format__ = object.__format__

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        answer, kept = self._client.call(self._target, arguments, named)
        match answer:
            case ["value", told]:
                return self._client.value(told, kept)
            case ["object", int(number)] if self._objects:
                return self._client.instance(number)
            case ["object", int()]:
                raise self._not_served() if self._closed else self._refuse("the value")
        raise self._client.tampered("a call's answer")

    def __getattr__(self, name: str) -> Any:
        if self._closed and not name.startswith("_"):
            raise self._not_served()
        if name.startswith("_") or not self._objects:
            raise AttributeError(name)
        return attribute(self._client, self._target, name)

    def _not_served(self) -> Over:
        what = f"the test needs the program's class {self._name}, whose objects stay there"
        return self._client.over("unserved", f"{what}; rewards.code_objects serves them")


class Instance(_Refusing):
    """An object of a class that the test names: a number here. Its methods are called there, its attributes read there."""

    def __init__(self, client: Client, target: list):
        object.__setattr__(self, "_client", client)
        object.__setattr__(self, "_target", target)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return attribute(self._client, self._target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise self._refuse(f"a new .{name}")

    def _exact(self, method: str, kind: type, *arguments: Any) -> Any:
        value = attribute(self._client, self._target, method)(*arguments)
        if type(value) is not kind:
            raise TypeError(f"{method} returned {type(value).__name__}")
        return value

    def __len__(self) -> int:
        return self._exact("__len__", int)

    def __str__(self) -> str:
        return self._exact("__str__", str)

    def __repr__(self) -> str:
        return self._exact("__repr__", str)

    __format__ = object.__format__

    def __contains__(self, value: Any) -> bool:
        return self._exact("__contains__", bool, value)

    def __getitem__(self, key: Any) -> Any:
        return attribute(self._client, self._target, "__getitem__")(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        attribute(self._client, self._target, "__setitem__")(key, value)

    def __iter__(self) -> Stream:
        found = attribute(self._client, self._target, "__iter__")()
        if type(found) is not Stream:
            raise TypeError("__iter__ returned no iterator")
        return found

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return attribute(self._client, self._target, "__call__")(*arguments, **named)


class Returned(Instance):
    """An object that a call gave: where the test expects a value, it answers nothing. Its methods can be called."""

    def _exact(self, method: str, kind: type, *arguments: Any) -> Any:
        raise self._refuse(method)

    def __getitem__(self, key: Any) -> Any:
        raise self._refuse("an item")

    def __iter__(self) -> Stream:
        raise self._refuse("the items")


_ANSWERED_BY_DATA = {
    name for kind in (str, bytes, set, int, float) for name in dir(kind) if name.startswith(("is", "startsw", "endsw"))
}
"""Methods of built-in types that answer yes or no: an object of the program with such a method may stand for a value."""


def attribute(client: Client, target: list, name: str) -> Any:
    if name in _ANSWERED_BY_DATA:
        raise client.over("unserved", f"the test asks .{name} of an object of the program, which may stand for a value")
    match client.ask(["get", target, name]):
        case ["value", told]:
            return client.value(told)
        case ["function" | "class", int(number), *_]:
            return Stub(client, ["h", number], name)
    raise client.tampered("an attribute")


class Awaited(_Refusing):
    """A coroutine of the program: awaited over there, at the first step here."""

    def __hash__(self) -> int:
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] != "asyncio":  # event loops hash coroutines
            raise self._refuse("the hash")
        return object.__hash__(self)

    def __init__(self, client: Client, number: int):
        self._client, self._target = client, ["w", number]

    def __await__(self) -> Generator[None, None, Any]:
        match self._client.ask(["await", self._target[1]]):
            case ["item", told]:
                return self._client.value(told)
        raise self._client.tampered("what is awaited")
        yield  # makes it a generator

    def send(self, value: None) -> Any:
        return self.__await__().send(value)

    def throw(self, *error: Any) -> Any:
        raise error[0]

    def close(self) -> None:
        """Has nothing to end."""


class Raised(type):
    """The class of a program's exception: it can be caught by name, but calling it makes no object of the program."""

    client: Client

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        raise cls.client.over("unserved", f"the test needs the program's class {cls.__name__}, whose objects stay there")


class Stream(_Refusing):
    """An iterator of the program: each item is asked for, none after the end."""

    def __init__(self, client: Client, number: int):
        self._client, self._target, self._ended = client, ["g", number], False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        if not self._ended:
            match self._client.ask(["next", self._target[1]]):
                case ["item", told]:
                    return self._client.value(told)
                case ["end"]:
                    self._ended = True
                case _:
                    raise self._client.tampered("an item")
        raise StopIteration


def _documentation(stand_in: _Refusing) -> str:
    raise stand_in._refuse("the documentation")


for _kind in (Stub, Instance, Returned, Awaited, Stream):
    _kind.__doc__ = property(_documentation)  # type: ignore[assignment]  # that of what they stand for, which may have none
