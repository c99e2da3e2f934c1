"""Spikes of loss and gradient norm: values far above those of the steps before."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from tulu_mega.config import SpikeSettings

SIGNALS = ("loss", "grad_norm")
_ENOUGH = 10
"""Updates that must be known before one can be called a spike."""


class Spikes:
    """Compares each update's loss and gradient norm with the median of the last ones.

    Deterministic, from figures that every rank has: all ranks come to the same result.

    Args:
        settings: how many times the median is a spike, and what happens then.
        signals: the names of `SIGNALS` to compare. A policy's loss means nothing: it is a sum of advantages, which add up to 0.
    """

    def __init__(self, settings: SpikeSettings, signals: Sequence[str] = SIGNALS):
        self._settings = settings
        self._known: dict[str, list[float]] = {name: [] for name in signals}
        self.found = ""
        """Description of the spike in the last update; empty when it had none."""
        self.total = 0
        """Number of updates with a spike."""

    @property
    def state(self) -> dict[str, Any]:
        """The values that a checkpoint keeps, so that a resumed run judges as if it had never stopped."""
        return {"known": self._known, "total": self.total}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the values of a checkpoint."""
        self._known, self.total = {name: list(values) for name, values in state["known"].items()}, state["total"]

    def take(self) -> str:
        """Return the description of the last update's spike, and forget it."""
        found, self.found = self.found, ""
        return found

    @property
    def stop(self) -> bool:
        """Whether a spike ends the run."""
        return self._settings.action == "stop"

    def allow(self, loss: float, norm: float) -> bool:
        """Judge an update before it is applied, once; return whether to apply it.

        Args:
            loss: of the global batch.
            norm: of its gradient, before clipping.
        """
        values = {name: value for name, value in zip(SIGNALS, (loss, norm), strict=True) if name in self._known}
        spikes = [self._spike(name, value) for name, value in values.items()]
        self.found = "; ".join(filter(None, spikes))
        self.total += bool(self.found)
        if self.found and self._settings.action != "warn":
            return False  # the values stay out of the next update's median, too
        for name, value in values.items():
            if math.isfinite(value):
                self._known[name] = [*self._known[name], value][-self._settings.window :]
        return True

    def _spike(self, name: str, value: float) -> str:
        known = self._known[name]
        if not self._settings.factor or len(known) < min(_ENOUGH, self._settings.window):
            return ""
        usual = statistics.median(known)
        if usual <= 0 or not value > self._settings.factor * usual:  # the engine skips what is not finite in any case
            return ""
        times = f"{value / usual:.1f} times the median of the last {len(known)} steps, {usual:.4g}"
        return f"{name.replace('_', ' ')} {value:.4g} is {times}"
