"""The schedule of a run's checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from tulu_mega.errors import Stopped, UserError
from tulu_mega.train.saver import Saver


@dataclass(frozen=True)
class Known:
    """What every rank knows of all at the end of a step, so that nobody has to be asked."""

    asked: bool
    """whether a stop was requested of any rank"""
    writing: bool
    """whether any rank is still writing a checkpoint"""


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

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing a checkpoint, behind training."""
        return self._saver.writing

    def after_step(
        self, done: int, state: Callable[[], dict[str, Any]], failure: UserError | None = None, known: Known | None = None
    ) -> None:
        """Save if a checkpoint is due, and end the run if a stop was requested.

        Args:
            done: finished steps.
            state: gives the state that the checkpoint keeps beside the engine's; every rank calls it, when a checkpoint is due.
            failure: ends the run after a checkpoint; the same on every rank.
            known: spares asking all ranks, which on GPUs waits for them; they are asked all the same where a checkpoint is due,
                so that a stop requested up to then is not left for after the next step.

        Raises:
            UserError: on every rank, the failure, or that a checkpoint could not be written.
            Stopped: on every rank, a stop was requested of any.
        """
        self._saver.poll(known.writing if known else None)
        due = done == self._steps or bool(self._every and done % self._every == 0)
        stop = known.asked if known and (known.asked or not due) else self._stop_requested()
        ending = failure or (Stopped(done) if stop else None)
        if ending or due:
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
