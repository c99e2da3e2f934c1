"""On PYTHONPATH: kills a rank as it begins to do something, each moment of a list once, over restarts.

KILL_MOMENTS: JSON, a list of [rank, "module:function" or "module:Class.method", whose, number]: the call of that number by the
process of that rank; of an engine's method `whose` is "value" or "policy", else "". KILL_STATE: a file with a line for each
moment that is past.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path


class _Armed:
    """Wraps the function of a moment once its module has been imported."""

    def __init__(self, what: str, whose: str, number: int, state: Path):
        self._module, _, self._name = what.partition(":")
        self._what, self._whose, self._left, self._state = what, whose, number, state

    def find_spec(self, name, path=None, target=None):
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            *owner, attribute = self._name.split(".")
            place = functools.reduce(getattr, owner, module)
            setattr(place, attribute, self._wrapped(getattr(place, attribute)))

        spec.loader.exec_module = exec_module
        return spec

    def _wrapped(self, function):
        @functools.wraps(function)
        def call(*args, **named):
            if not self._whose or args[0].reward == (self._whose == "value"):
                self._left -= 1
                if not self._left:
                    with self._state.open("a") as file:
                        file.write(f"{self._what} {self._whose}\n")
                        file.flush()
                        os.fsync(file.fileno())
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **named)

        return call


if "KILL_MOMENTS" in os.environ and "RANK" in os.environ:
    _state = Path(os.environ["KILL_STATE"])
    _past = len(_state.read_text().splitlines()) if _state.exists() else 0
    for _rank, _what, _whose, _number in json.loads(os.environ["KILL_MOMENTS"])[_past : _past + 1]:
        if str(_rank) == os.environ["RANK"]:
            sys.meta_path.insert(0, _Armed(_what, _whose, _number, _state))
