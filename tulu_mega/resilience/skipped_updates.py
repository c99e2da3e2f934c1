"""Counts the updates that were skipped because their loss or gradient was not finite; ends a run with too many in a row, or with
no others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tulu_mega.errors import UserError
from tulu_mega.launch.run_files import Lines


@dataclass
class SkippedUpdates:
    """The count of skipped updates."""

    allowed: int
    """Skipped updates in a row that end the run."""
    file: Path
    """JSONL file that lists the rows of skipped updates."""
    total: int = 0
    in_a_row: int = 0
    finite: int = 0
    """Updates that were not skipped."""

    @property
    def state(self) -> dict[str, int]:
        """The counts that a checkpoint keeps."""
        return {"skipped": self.total, "skipped_in_a_row": self.in_a_row, "finite_updates": self.finite}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the counts of a checkpoint."""
        self.total, self.in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.finite = state.get("finite_updates", 1)  # older checkpoints do not say: the benefit of the doubt

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
            UserError: too many updates in a row were skipped; or, where they are written, the file cannot be.
        """
        if finite:
            self.in_a_row = 0
            self.finite += 1
            return
        self.total += 1
        self.in_a_row += 1
        if write:
            with Lines(self.file) as file:
                file.append(json.dumps({"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "rows": rows()}))
        if self.in_a_row >= self.allowed:
            raise UserError(
                f"stopped at step {step}: loss or gradient was not finite in {self.in_a_row} steps in a row "
                f"(loss {loss}, gradient norm {grad_norm}); the rows of these batches are in {self.file}. "
                "Look at them, or lower optim.lr; train.max_skipped sets how many steps in a row are let pass. The newest "
                "checkpoint from before them is kept"
            )

    def check_learned(self) -> None:
        """See whether a run that is over has learned anything.

        Raises:
            UserError: every update was skipped, or there was none.
        """
        if self.finite:
            return
        why = "it had nothing to learn from in any step"
        if self.total:
            why = f"loss or gradient was not finite in any of its {self.total} updates, whose rows are in {self.file}"
        raise UserError(
            f"nothing was learned, and no model is exported: {why}. Look at these, at the model's weights, or lower optim.lr; "
            "then begin anew in another run_dir"
        )


def in_streak(state: Mapping[str, Any]) -> int:
    """The updates in a row, up to the checkpoint whose state this is, that were skipped."""
    return state.get("skipped_in_a_row", 0)
