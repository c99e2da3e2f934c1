"""Evaluates a test in a process that the judged program never enters: the program's names are stubs whose calls go over."""

from __future__ import annotations

import builtins
import time
from typing import Any

from .client import Client
from .stubs import Over, Stub

_LOOK_SECONDS = 1.0


class Names(dict):
    """The test's globals. Its own names, its prompt's and Python's come first; what is left is the program's.

    Args:
        theirs: names of Python's that the program defines anew and the test means so.
        objects: whether calling a class of the program gives the test an object.
    """

    def __init__(self, client: Client, theirs: list[str], objects: bool):
        super().__init__(__name__="__main__", __builtins__=builtins)
        self._client, self._objects = client, objects
        self._stubs: dict[str, Any] = {}
        self._looks: dict[str, tuple[int, float, Any]] = {}
        for name in theirs:
            self[name] = self._of_program(name)

    def __missing__(self, name: str) -> Any:
        if name in builtins.__dict__ or name.startswith("__"):
            raise KeyError(name)
        if name not in self._stubs:
            found = self._seen(name)
            if not isinstance(found, (Stub, type)):
                return found  # data, which may change
            self._stubs[name] = found
        return self._stubs[name]

    def _seen(self, name: str) -> Any:
        """What the name stands for: the same at each look until something is called, so that no thread of the program shows one
        look this and the next that; a test that waits for a change sees it after a while."""
        asked, until, found = self._looks.get(name, (-1, 0.0, None))
        if asked != self._client.asked or time.monotonic() > until:
            found = self._of_program(name)
            self._looks[name] = self._client.asked, time.monotonic() + _LOOK_SECONDS, found
        return found

    def _of_program(self, name: str) -> Any:
        match self._client.ask(["name", name]):
            case ["none"]:
                raise KeyError(name)
            case ["function", int(number)]:
                return Stub(self._client, ["h", number], name)
            case ["class", int(number), [str(), *bases]] if all(type(base) is str for base in bases):
                if "BaseException" in bases:
                    return self._client.new_exception(name, bases)
                named = name[:1].isupper()
                return Stub(self._client, ["h", number], name, named and self._objects, named and not self._objects)
            case ["value", told]:
                return self._client.value(told)
        raise self._client.tampered("a name")


def evaluate(test: dict, client: Client, objects: bool) -> dict:
    """Runs a test: ``{"passed", "kind", "detail"}``.

    Args:
        objects: whether the test may have objects of the program's classes.
    """
    try:
        client.hear_start()
        names = Names(client, test.get("theirs", []), objects)
        for part in ("setup", "statement"):
            exec(compile(test.get(part, ""), f"<{part}>", "exec", dont_inherit=True), names)
    except Over:
        pass
    except BaseException as error:
        if client.trouble is None:
            return _failed(error)
    if client.trouble is not None:
        kind, detail = client.trouble
        return {"passed": False, "kind": kind, "detail": detail}
    return {"passed": True, "kind": "", "detail": ""}


def _failed(error: BaseException) -> dict:
    told = getattr(error, "told", None)
    if type(told) is str:
        kind = "memory" if isinstance(error, MemoryError) else "error"
        return {"passed": False, "kind": kind, "detail": told}
    text = f"{type(error).__name__}: {error}"[:300] if str(error) else type(error).__name__
    kind = "error" if isinstance(error, NameError) else "memory" if isinstance(error, MemoryError) else "wrong"
    return {"passed": False, "kind": kind, "detail": text}
