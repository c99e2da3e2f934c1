"""The training loop of every stage that learns from a fixed data set."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tulu_mega.data.loader import PackedLoader, StepData
from tulu_mega.errors import UserError
from tulu_mega.process import Collections
from tulu_mega.resilience.guards import Guards
from tulu_mega.train.adapter_figures import adapter_figures
from tulu_mega.train.batch_loss import BatchLoss
from tulu_mega.train.engine import Engine, Objective, Update
from tulu_mega.train.metrics import MetricsLog, StepRecord, StepSeconds
from tulu_mega.train.profiling import StepProfiler
from tulu_mega.train.save_schedule import Known, SaveSchedule

FirstLoss = Callable[[BatchLoss], None]
"""Checks the loss of the first step before its update; raises UserError, on every rank, when the loss cannot be right."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that are evaluated and not trained on."""

    loader: PackedLoader
    """Draws each row once."""
    every: int
    """Steps between evaluations."""
    objective: Objective
    """Gives the reported means, each over the count of its loss (pairs, tokens)."""

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Return loss and metrics over all rows, named ``heldout_...``; the same on every rank."""
        losses = [engine.evaluate(data.micro_batches, self.objective) for data in self.loader]
        total = sum(loss.count for loss in losses)
        names = ("loss", *self.objective.reported)
        return {
            f"heldout_{name}": sum((loss.loss if name == "loss" else loss.metrics[name]) * loss.count for loss in losses) / total
            for name in names
        }


@dataclass
class Fit:
    """One pass through the remaining steps: forward and backward, update, evaluation, report, checkpoint."""

    engine: Engine
    loader: PackedLoader
    objective: Objective
    guards: Guards
    saves: SaveSchedule
    where: Callable[[int], str]
    """Gives file and line of a row."""
    flops: Callable[[StepData], float]
    """Gives the FLOP of a step, all ranks together."""
    log: MetricsLog | None
    """Rank 0's report."""
    profiler: StepProfiler
    heldout: HeldOut | None = None
    first: FirstLoss | None = None

    def run(self, start: int) -> None:
        """Train from step `start` (steps done before) to the loader's last.

        Raises:
            UserError: a checkpoint cannot be written, too many steps in a row are not finite, or a spike ends the run.
            Stopped: on every rank, at the end of a step, when any rank received a signal to stop.
        """
        with self.guards, Collections() as collections:
            if start == 0 and self.heldout:
                found, seconds = self._figures(self.heldout)
                if self.log:
                    self.log.before_first_step(found, seconds)
            for step in range(start, self.loader.steps):
                with self.profiler.step(step + 1):
                    self._step(step)
                collections.after_step(step + 1)
        self.saves.finish()

    def _step(self, step: int) -> None:
        done, guards, objective = step + 1, self.guards, self.objective
        guards.before_step(done)
        began = time.perf_counter()
        data = self.loader.batches(step)
        packed = time.perf_counter()
        with guards.working():
            reduced = self.engine.forward_backward(data.micro_batches, objective, marks=self._marks)
            if self.first and step == 0:
                self.first(reduced.read())
            update = self.engine.optimizer_step(step, reduced, guards.allow)
        updated = time.perf_counter()
        loss, (asked, writing) = reduced.read(), reduced.marks
        seconds = StepSeconds(packed - began, update.known - packed, updated - update.known, self.saves.take_seconds())

        spike = guards.after_update(done, update.finite, loss.loss, update.grad_norm, lambda: self._rows(data))
        if spike:
            self._end_before(step, spike, data)
        heldout = self._evaluated(done)
        report = guards.after_step(done)
        figures = {**heldout, **adapter_figures(self.engine)}
        if self.log:
            self.log.step(self._record(done, data, loss, update, seconds, figures), report)
        known = None if heldout else Known(asked, writing)  # an evaluation takes its time
        self.saves.after_step(done, lambda: guards.state, known=known)

    def _marks(self) -> tuple[bool, bool]:
        """What this rank tells the others with its loss."""
        return self.guards.asked_to_end, self.saves.writing

    def _end_before(self, step: int, spike: str, data: StepData) -> None:
        """End the run, on every rank, with a checkpoint of the state before the update."""
        self.guards.uncount_spike()
        failure = UserError(
            f"stopped before the update of step {step + 1}: {spike}. The state before it is saved; its rows begin with "
            f"{self.where(data.rows[0])}. Look at them, then go on with --train.spike skip or warn"
        )
        self.saves.end(step, self.guards.state, failure)

    def _rows(self, data: StepData) -> list[dict[str, Any]]:
        return [{"row": row, "where": self.where(row)} for row in data.rows]

    def _evaluated(self, done: int) -> dict[str, float]:
        if self.heldout is None or (done % self.heldout.every and done != self.loader.steps):
            return {}
        found, seconds = self._figures(self.heldout)
        if self.log:
            self.log.evaluated(done, found)
        return {**found, "seconds_evaluation": seconds}

    def _figures(self, heldout: HeldOut) -> tuple[dict[str, float], float]:
        """The figures, and the seconds that they took."""
        began = time.perf_counter()
        return heldout.evaluate(self.engine), time.perf_counter() - began

    def _record(
        self, done: int, data: StepData, loss: BatchLoss, update: Update, seconds: StepSeconds, figures: dict[str, float]
    ) -> StepRecord:
        return StepRecord(
            step=done,
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
                **figures,
                "sequences": data.sequences,
                "schedule_efficiency": data.schedule_efficiency,
            },
        )
