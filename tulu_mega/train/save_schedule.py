"""The schedule of a run's checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NoReturn

from tulu_mega.errors import Stopped, UserError
from tulu_mega.train.saver import Saver


class SaveSchedule:
    """Saves every so many steps, after the last step, and before the run ends early. Every rank calls every method.

    Args:
        saver: writes the checkpoints.
        every: steps between checkpoints; None saves after the last step alone.
        steps: steps of the whole run.
        stop_requested: a collective; whether the run is to end after this step, the same on every rank.
    """

    def __init__(self, saver: Saver, every: int | None, steps: int, stop_requested: Callable[[], bool]):
        self._saver, self._every, self._steps, self._stop_requested = saver, every, steps, stop_requested
        self._seconds = 0.0

    def after_step(self, done: int, state: Callable[[], dict[str, Any]], failure: UserError | None = None) -> None:
        """Save if a checkpoint is due, and end the run if a stop was requested.

        Args:
            done: finished steps.
            state: gives the state that the checkpoint keeps beside the engine's; every rank calls it, when a checkpoint is due.
            failure: ends the run after a checkpoint; the same on every rank.

        Raises:
            UserError: on every rank, the failure, or that a checkpoint could not be written.
            Stopped: on every rank, a stop was requested of any.
        """
        self._saver.poll()
        stop = self._stop_requested()
        ending = failure or (Stopped(done) if stop else None)
        if ending or done == self._steps or (self._every and done % self._every == 0):
            began = time.perf_counter()
            self._saver.save(done, state())
            self._seconds = time.perf_counter() - began
        if ending:
            self._saver.finish()
            raise ending

    def end(self, done: int, state: dict[str, Any], failure: UserError) -> NoReturn:
        """Save, wait until the checkpoint is on disk, and raise the failure.

        Args:
            done: finished steps.
            state: kept beside the engine's.
            failure: the same on every rank.
        """
        self._saver.save(done, state)
        self._saver.finish()
        raise failure

    def take_seconds(self) -> float:
        """Return the seconds that saving has taken since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk. Raises UserError as `after_step`."""
        self._saver.finish()
