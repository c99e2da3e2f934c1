"""Counts the updates that were skipped because their loss or gradient was not finite, and ends a run with too many in a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tulu_mega.errors import UserError


@dataclass
class SkippedUpdates:
    """The count of skipped updates."""

    allowed: int
    """Skipped updates in a row that end the run."""
    file: Path
    """JSONL file that lists the rows of skipped updates."""
    total: int = 0
    in_a_row: int = 0

    @property
    def state(self) -> dict[str, int]:
        """The counts that a checkpoint keeps."""
        return {"skipped": self.total, "skipped_in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the counts of a checkpoint."""
        self.total, self.in_a_row = state["skipped"], state["skipped_in_a_row"]

    def note(
        self, finite: bool, step: int, loss: float, grad_norm: float, rows: Callable[[], list[dict[str, Any]]], write: bool
    ) -> None:
        """Count an update; write the rows of a skipped one.

        Args:
            finite: whether loss and gradient were finite; the update was skipped if not.
            step: from 1.
            rows: gives the rows of the update's batch, for people; called only where they are written.
            write: whether this is the rank that writes.

        Raises:
            UserError: too many updates in a row were skipped.
        """
        if finite:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if write:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                skipped = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "rows": rows()}
                file.write(json.dumps(skipped) + "\n")
        if self.in_a_row >= self.allowed:
            raise UserError(
                f"stopped at step {step}: loss or gradient was not finite in {self.in_a_row} steps in a row "
                f"(loss {loss}, gradient norm {grad_norm}); the rows of these batches are in {self.file}. "
                "Look at them, or lower optim.lr; train.max_skipped sets how many steps in a row are let pass"
            )
