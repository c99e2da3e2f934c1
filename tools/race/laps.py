"""The racers' side of a race (see racing.py): stand at the start, run a lap when told, say how long it took.

Imported in the environments of both sides; needs nothing but Python.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

MARK = "@lap "
"""Begins the lines of standard output that are meant for the race; everything else there is the library's chatter."""


@dataclass
class Laps:
    """One process's laps. Every rank of a racer has its own, made right after the imports; the race starts them together."""

    _began: float = field(default=0.0, init=False)
    _imports: int = field(default_factory=lambda: _memory("VmRSS"), init=False)

    def ready(self, **facts: Any) -> None:
        """Everything is loaded; `facts` go into the race's report."""
        _say(facts)

    def begin(self) -> None:
        """Waits to be told, then starts the clock. Ends the process where the race is over."""
        if not sys.stdin.readline():
            sys.exit(0)
        self._began = time.perf_counter()

    def end(self, **facts: Any) -> None:
        """Stops the clock and reports; peak_bytes is the most memory so far beyond what imports took."""
        seconds = time.perf_counter() - self._began
        _say({"seconds": seconds, "peak_bytes": _memory("VmHWM") - self._imports, **facts})


def spec() -> dict[str, Any]:
    """What this racer is to run, as the race wrote it onto the command line."""
    return json.loads(sys.argv[1])


def _memory(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def _say(record: dict[str, Any]) -> None:
    print(MARK + json.dumps(record), flush=True)
