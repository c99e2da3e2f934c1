"""The training loop of every stage that learns from a fixed data set."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tulu_mega import checkpoint
from tulu_mega.config import CheckpointSettings
from tulu_mega.data.loader import PackedLoader, StepData
from tulu_mega.engine import BatchLoss, Engine, Objective
from tulu_mega.errors import UserError
from tulu_mega.metrics import MetricsLog, StepRecord, StepSeconds


@dataclass
class Skips:
    """Steps that were not applied because their loss or gradient was not finite."""

    allowed: int
    """in a row"""
    file: Path
    """where their rows are written"""
    where: Callable[[int], str]
    """file and line of a row"""
    total: int = 0
    in_a_row: int = 0

    def note(self, applied: bool, data: StepData, loss: float, grad_norm: float, write: bool) -> None:
        """Counts a step; writes the rows of one that was skipped.

        Raises:
            UserError: too many in a row.
        """
        if applied:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if write:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                rows = [{"row": row, "where": self.where(row)} for row in data.rows]
                skipped = {"step": data.step + 1, "loss": str(loss), "grad_norm": str(grad_norm), "rows": rows}
                file.write(json.dumps(skipped) + "\n")
        if self.in_a_row >= self.allowed:
            raise UserError(
                f"stopped at step {data.step + 1}: loss or gradient was not finite in {self.in_a_row} steps in a row "
                f"(loss {loss}, gradient norm {grad_norm}); the rows of these batches are in {self.file}. "
                "Look at them, or lower optim.lr; train.max_skipped sets how many steps in a row are let pass"
            )


FirstLoss = Callable[[BatchLoss], None]
"""Looks at the loss of the first step before its update; raises UserError, on every rank, when it cannot be right."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that are evaluated and not trained on."""

    loader: PackedLoader
    """draws each row once"""
    every: int
    """steps"""

    def evaluate(self, engine: Engine, objective: Objective) -> dict[str, float]:
        """Loss and metrics over all rows, named ``heldout_...``; the same on every rank."""
        losses = [engine.evaluate(data.micro_batches, objective) for data in self.loader]
        total = sum(loss.count for loss in losses)
        names = ("loss", *objective.reported)
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
    flops: Callable[[StepData], float]
    """of a whole step"""
    log: MetricsLog | None
    """rank 0's"""
    heldout: HeldOut | None = None
    first: FirstLoss | None = None
    _saving: float = field(default=0.0, init=False)

    def run(self, start: int) -> None:
        """Trains from step `start` (steps done before) to the loader's last.

        Raises:
            UserError: a checkpoint cannot be written, or too many steps in a row are not finite.
        """
        saver = checkpoint.Saver(
            self.engine, self.directory, self.settings.keep, self.settings.format, self.settings.asynchronous
        )
        for step in range(start, self.loader.steps):
            began = time.perf_counter()
            data = self.loader.batches(step)
            packed = time.perf_counter()
            loss = self.engine.forward_backward(data.micro_batches, self.objective)
            computed = time.perf_counter()
            if self.first and step == 0:
                self.first(loss)
            update = self.engine.optimizer_step(step, loss.loss)
            ended = time.perf_counter()
            seconds = StepSeconds(packed - began, computed - packed, ended - computed, self._saving)
            self._saving = 0.0
            self.skips.note(update.applied, data, loss.loss, update.grad_norm, write=self.log is not None)
            heldout = self._evaluated(step + 1)
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
                        },
                    )
                )
            self._save_if_due(saver, step + 1)
        saver.finish()

    def _evaluated(self, done: int) -> dict[str, float]:
        if self.heldout is None or (done % self.heldout.every and done != self.loader.steps):
            return {}
        found = self.heldout.evaluate(self.engine, self.objective)
        if self.log:
            self.log.evaluated(done, found)
        return found

    def _save_if_due(self, saver: checkpoint.Saver, done: int) -> None:
        saver.poll()
        every = self.settings.every
        if done == self.loader.steps or (every and done % every == 0):
            began = time.perf_counter()
            state = {"skipped": self.skips.total, "skipped_in_a_row": self.skips.in_a_row}
            saver.save(done, state)
            self._saving = time.perf_counter() - began
