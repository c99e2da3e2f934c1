"""Losses and gradients that leap: told from what the steps before them gave."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from tulu_mega.config import SpikeSettings

SIGNALS = ("loss", "grad_norm")
_ENOUGH = 10
"""Updates that have to be known before one can be called a leap."""


class Spikes:
    """The last losses and gradient norms, and whether an update's are more than so many times their median.

    Deterministic, of figures that every rank has: all ranks come to the same.

    Args:
        settings: how far is too far, and what is done then.
        signals: what is watched of `SIGNALS`. A policy's loss says nothing: it is of advantages, which add up to 0.
    """

    def __init__(self, settings: SpikeSettings, signals: Sequence[str] = SIGNALS):
        self._settings = settings
        self._known: dict[str, list[float]] = {name: [] for name in signals}
        self.found = ""
        """what leaps in the update looked at last; empty when nothing does"""
        self.total = 0
        """updates that leapt"""

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a run that goes on judges as if it had never stopped."""
        return {"known": self._known, "total": self.total}

    def restore(self, state: dict[str, Any]) -> None:
        self._known, self.total = {name: list(values) for name, values in state["known"].items()}, state["total"]

    def stops_for(self, found: str) -> bool:
        """Whether the run is to end because of what was found."""
        return bool(found) and self._settings.action == "stop"

    def allow(self, loss: float, norm: float) -> bool:
        """Looks at an update before it is made, once; whether it is to be made.

        Args:
            loss: of the global batch.
            norm: of its gradient, before clipping.
        """
        values = {name: value for name, value in zip(SIGNALS, (loss, norm), strict=True) if name in self._known}
        told = [self._leap(name, value) for name, value in values.items()]
        self.found = "; ".join(filter(None, told))
        self.total += bool(self.found)
        if self.found and self._settings.action != "warn":
            return False  # nor does the next one's median know of it
        for name, value in values.items():
            if math.isfinite(value):
                self._known[name] = [*self._known[name], value][-self._settings.window :]
        return True

    def _leap(self, name: str, value: float) -> str:
        known = self._known[name]
        if not self._settings.factor or len(known) < min(_ENOUGH, self._settings.window):
            return ""
        usual = statistics.median(known)
        if usual <= 0 or not value > self._settings.factor * usual:  # what is not finite is skipped by the engine anyway
            return ""
        times = f"{value / usual:.1f} times the median of the last {len(known)} steps, {usual:.4g}"
        return f"{name.replace('_', ' ')} {value:.4g} is {times}"
