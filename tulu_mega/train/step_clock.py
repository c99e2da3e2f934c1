"""Wall-clock time of a step by its parts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping


class StepClock:
    """Measures how long each part of a step takes; the beginning of a part is also a mark for the watchdog.

    Args:
        at: takes the name of each part that begins; see `Watchdog.at`.
    """

    def __init__(self, at: Callable[[str], None]):
        self._at = at
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self._began, self._seconds = time.perf_counter(), {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to the seconds of the part."""
        self._at(name)
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count seconds of one part to another.

        Args:
            seconds: the number of them.
            source: name of the part that measured them.
            target: name of the part that they belong to.
        """
        self._seconds[source] -= seconds
        self._seconds[target] = self._seconds.get(target, 0.0) + seconds

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds by part, of those that the step has had."""
        return self._seconds

    @property
    def whole(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self._began
