"""Evaluates a policy on held-out prompts, every so many steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tulu_mega.data.prompts import PromptSet
from tulu_mega.distributed.collectives import Crew
from tulu_mega.rl import journal
from tulu_mega.rl.scheduler import Scheduler
from tulu_mega.train.metrics import MetricsLog


@dataclass(frozen=True)
class Evaluator:
    """Greedy answers to the held-out prompts, judged by their verifiers. Every rank makes one and calls its methods."""

    crew: Crew
    run_dir: Path
    every: int
    """Steps between evaluations; 0: never."""
    start: int
    """Steps that were done when the run began: a resumed run has evaluated these already."""
    steps: int
    """Steps of the whole run."""
    scheduler: Scheduler | None
    """Rank 0's."""
    prompts: PromptSet | None
    """Rank 0's held-out prompts."""
    log: MetricsLog | None
    """Rank 0's report."""

    def due(self, done: int) -> bool:
        """Whether to evaluate after so many steps."""
        fresh = done == 0 or done > self.start
        return bool(self.every) and fresh and (done % self.every == 0 or done == self.steps)

    def evaluate(self, done: int) -> dict[str, float]:
        """Return the figures, named ``heldout_...``, the same on every rank; rank 0 writes the answers to the run directory.

        Args:
            done: finished steps; the version of the weights.
        """
        return self.crew.share(partial(self._evaluated, done))

    def _evaluated(self, done: int) -> dict[str, float]:
        evaluation = self.scheduler.evaluate(self.prompts, version=done)
        journal.write_evaluation(self.run_dir, done, evaluation)
        figures = evaluation.figures()
        self.log.evaluated(done, figures)
        return figures
