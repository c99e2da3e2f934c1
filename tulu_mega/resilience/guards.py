"""All guards of a training loop behind one object: a new guard is a file here and a few lines in `Guards`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tulu_mega.config import PolicyTrainSettings, TrainSettings
from tulu_mega.resilience.skipped_updates import SkippedUpdates
from tulu_mega.resilience.spikes import SIGNALS, Spikes
from tulu_mega.resilience.stop_signal import StopSignal
from tulu_mega.resilience.stragglers import Stragglers
from tulu_mega.resilience.watchdog import Watchdog

Rows = Callable[[], list[dict[str, Any]]]
"""Gives the rows of an update's batch, for people."""


@dataclass(frozen=True)
class GuardReport:
    """The guards' part of a step's report."""

    figures: Mapping[str, float | int | str]
    """Entries of metrics.jsonl."""
    remark: str = ""
    """Part of the console line."""
    warnings: list[str] = field(default_factory=list)
    """Lines for standard error."""


class Guards:
    """Watches a training run, in this order of a step::

        guards.before_step(step)
        with guards.working():
            ...                                      # forward, backward
            update = optimizer_step(..., guards.allow)
        spike = guards.after_update(step, ...)       # once for each update of the step
        report = guards.after_step(step)
        if guards.stop_requested(): ...

    A context manager: while entered, signals to stop are noted instead of ending the process. Every rank makes one and calls its
    methods in the same order; `Stragglers` and `stop_requested` hold collectives.

    Args:
        settings: the limits of each guard.
        watchdog: the session's; the guards mark the beginning of each step.
        device: the ranks' device.
        pipeline_rank: this rank's pipeline stage.
        lead: whether this rank, rank 0, writes and prints.
        skipped_file: JSONL file that lists the rows of skipped updates.
        spike_signals: the names of `SIGNALS` in which spikes are looked for.
    """

    def __init__(
        self,
        settings: TrainSettings | PolicyTrainSettings,
        watchdog: Watchdog,
        device: torch.device,
        pipeline_rank: int,
        lead: bool,
        skipped_file: Path,
        spike_signals: Sequence[str] = SIGNALS,
    ):
        self._watchdog, self._lead = watchdog, lead
        self._stop_signal = StopSignal(device)
        self._skipped = SkippedUpdates(settings.max_skipped, skipped_file)
        self._spikes = Spikes(settings.spike, spike_signals)
        self._stragglers = Stragglers(settings.straggler, settings.log_every, device, pipeline_rank)

    def __enter__(self) -> Guards:
        self._stop_signal.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop_signal.__exit__(*exception)

    @property
    def state(self) -> dict[str, Any]:
        """The guards' entries in the state of a checkpoint."""
        return {**self._skipped.state, "spikes": self._spikes.state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a checkpoint, which may have entries of others too."""
        self._skipped.restore(state)
        if "spikes" in state:  # older checkpoints have none
            self._spikes.restore(state["spikes"])

    def before_step(self, step: int) -> None:
        """Note that a step (from 1) begins."""
        self._watchdog.step(step)

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Wrap the computation by which ranks are compared."""
        return self._stragglers.working()

    def allow(self, loss: float, grad_norm: float) -> bool:
        """Judge an update whose loss and gradient norm are finite; return whether to apply it. The same on every rank."""
        return self._spikes.allow(loss, grad_norm)

    def after_update(self, step: int, finite: bool, loss: float, grad_norm: float, rows: Rows, name: str = "") -> str:
        """Count an update, applied or not, and warn of a spike in it.

        Args:
            step: from 1.
            finite: whether loss and gradient norm were.
            rows: of the update's batch.
            name: names the update in a warning; the step by default.

        Returns:
            The description of a spike that ends the run (`spike.action = "stop"`), else an empty text. The same on every rank.

        Raises:
            UserError: on every rank, too many updates in a row were not finite.
        """
        self._skipped.note(finite, step, loss, grad_norm, rows, write=self._lead)
        spike = self._spikes.take()
        if spike and self._spikes.stop:
            return spike
        if spike and self._lead:
            print(f"warning: {name or f'step {step}'}: {spike}", file=sys.stderr, flush=True)
        return ""

    def uncount_spike(self) -> None:
        """Take the last spike out of the count: the run ends before its step, and a resumed one meets the spike again."""
        self._spikes.total -= 1

    def after_step(self, step: int) -> GuardReport:
        """Return what the guards report of a step (from 1); rank 0's is complete."""
        figures = {"skipped_steps": self._skipped.total, "spikes": self._spikes.total}
        slowest = self._stragglers.report(step)
        if slowest is None:
            return GuardReport(figures)
        return GuardReport(figures | slowest.figures, slowest.remark, slowest.warnings)

    def check_learned(self) -> None:
        """See whether the run, which is over, has learned anything; on every rank the same.

        Raises:
            UserError: none of its updates was finite.
        """
        self._skipped.check_learned()

    @property
    def asked_to_end(self) -> bool:
        """Whether this rank received a signal to stop."""
        return self._stop_signal.noted

    def stop_requested(self) -> bool:
        """Whether any rank received a signal to stop. A collective, at the end of a step; the same on every rank."""
        return self._stop_signal.received()
