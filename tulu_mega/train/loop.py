"""The training loop of every stage that learns from a fixed data set."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tulu_mega.config import CheckpointSettings
from tulu_mega.data.loader import PackedLoader, StepData
from tulu_mega.errors import Stopped, UserError
from tulu_mega.resilience.spikes import Spikes
from tulu_mega.resilience.stop_signal import Ending
from tulu_mega.resilience.stragglers import Stragglers
from tulu_mega.resilience.watchdog import Watchdog
from tulu_mega.train.engine import BatchLoss, Engine, Objective
from tulu_mega.train.metrics import MetricsLog, StepRecord, StepSeconds
from tulu_mega.train.run import Skips
from tulu_mega.train.saver import Saver

FirstLoss = Callable[[BatchLoss], None]
"""Looks at the loss of the first step before its update; raises UserError, on every rank, when it cannot be right."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that are evaluated and not trained on."""

    loader: PackedLoader
    """draws each row once"""
    every: int
    """steps"""
    objective: Objective
    """what is reported of them: means, all over what its loss is counted by (pairs, tokens)"""

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Loss and metrics over all rows, named ``heldout_...``; the same on every rank."""
        losses = [engine.evaluate(data.micro_batches, self.objective) for data in self.loader]
        total = sum(loss.count for loss in losses)
        names = ("loss", *self.objective.reported)
        return {
            f"heldout_{name}": sum((loss.loss if name == "loss" else loss.metrics[name]) * loss.count for loss in losses) / total
            for name in names
        }


@dataclass
class Fit:
    """One pass through the steps that are left: forward and backward, update, evaluation, report, save."""

    engine: Engine
    loader: PackedLoader
    objective: Objective
    settings: CheckpointSettings
    directory: Path
    """of the checkpoints"""
    skips: Skips
    where: Callable[[int], str]
    """file and line of a row"""
    flops: Callable[[StepData], float]
    """of a whole step"""
    log: MetricsLog | None
    """rank 0's"""
    ending: Ending
    watch: Watchdog
    spikes: Spikes
    stragglers: Stragglers
    heldout: HeldOut | None = None
    first: FirstLoss | None = None
    _saving: float = field(default=0.0, init=False)

    def run(self, start: int) -> None:
        """Trains from step `start` (steps done before) to the loader's last.

        Raises:
            UserError: a checkpoint cannot be written, or too many steps in a row are not finite.
            Stopped: on every rank, after a step at whose end one of them had been asked to end.
        """
        saver = Saver(
            {"model": self.engine}, self.directory, self.settings.keep, self.settings.format, self.settings.asynchronous
        )
        with self.ending:
            for step in range(start, self.loader.steps):
                self._step(step, saver)
        saver.finish()

    def _step(self, step: int, saver: Saver) -> None:
        self.watch.step(step + 1)
        began = time.perf_counter()
        data = self.loader.batches(step)
        packed = time.perf_counter()
        with self.stragglers.working():
            loss = self.engine.forward_backward(data.micro_batches, self.objective)
            computed = time.perf_counter()
            if self.first and step == 0:
                self.first(loss)
            update = self.engine.optimizer_step(step, loss.loss, self.spikes.allow)
        ended = time.perf_counter()
        seconds = StepSeconds(packed - began, computed - packed, ended - computed, self._saving)
        self._saving = 0.0
        self.skips.note(
            update.finite, step + 1, loss.loss, update.grad_norm, functools.partial(self._told, data), self.log is not None
        )
        self._look_at_spike(step, data, saver)
        heldout = self._evaluated(step + 1)
        slowest = self.stragglers.report(step + 1)
        if self.log:
            self.log.step(
                StepRecord(
                    step=step + 1,
                    loss=loss.loss,
                    grad_norm=update.grad_norm,
                    lr=update.lr,
                    tokens=data.tokens,
                    supervised_tokens=data.supervised_tokens,
                    padding=data.padding,
                    flops=self.flops(data),
                    seconds=seconds,
                    extra={
                        **loss.metrics,
                        **heldout,
                        "sequences": data.sequences,
                        "schedule_efficiency": data.schedule_efficiency,
                        "skipped_steps": self.skips.total,
                        "spikes": self.spikes.total,
                    },
                ),
                slowest,
            )
        self._save_if_due(saver, step + 1, asked=self.ending.asked())

    @property
    def _state(self) -> dict[str, Any]:
        return {**self.skips.state, "spikes": self.spikes.state}

    def _look_at_spike(self, step: int, data: StepData, saver: Saver) -> None:
        """Says so when the step leapt; on every rank ends the run where that is wanted, with the state before its update."""
        if not self.spikes.found:
            return
        told, self.spikes.found = self.spikes.found, ""
        if self.spikes.stops_for(told):
            self.spikes.total -= 1  # whoever goes on comes to this step again
            saver.save(step, self._state)
            saver.finish()
            raise UserError(
                f"stopped before the update of step {step + 1}: {told}. The state before it is saved; its rows begin with "
                f"{self.where(data.rows[0])}. Look at them, then go on with --train.spike skip or warn"
            )
        if self.log:
            print(f"warning: step {step + 1}: {told}", file=sys.stderr, flush=True)

    def _told(self, data: StepData) -> list[dict[str, Any]]:
        return [{"row": row, "where": self.where(row)} for row in data.rows]

    def _evaluated(self, done: int) -> dict[str, float]:
        if self.heldout is None or (done % self.heldout.every and done != self.loader.steps):
            return {}
        began = time.perf_counter()
        found = self.heldout.evaluate(self.engine)
        if self.log:
            self.log.evaluated(done, found)
        return {**found, "seconds_evaluation": time.perf_counter() - began}

    def _save_if_due(self, saver: Saver, done: int, asked: bool) -> None:
        saver.poll()
        every = self.settings.every
        if asked or done == self.loader.steps or (every and done % every == 0):
            began = time.perf_counter()
            saver.save(done, self._state)
            self._saving = time.perf_counter() - began
        if asked:
            saver.finish()
            raise Stopped(done)
