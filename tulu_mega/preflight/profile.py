"""What is wrong with the steps and ranks that a run is to profile."""

from __future__ import annotations

import os

from tulu_mega.config import ProfileSettings, RunSettings
from tulu_mega.errors import UserError


def check_ranks(settings: RunSettings) -> None:
    """The world has the ranks.

    Raises:
        UserError: it has not; under torchrun by its world, otherwise by the settings.
    """
    wanted, parallel = settings.train.profile, settings.parallel
    if wanted is None:
        return
    joined = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "").isdecimal()
    size = int(os.environ["WORLD_SIZE"]) if joined else parallel.model_parallel * (parallel.data or 1)
    if not (beyond := [rank for rank in wanted.ranks if rank >= size]):
        return
    unsaid = "" if joined or parallel.data else " (under torchrun there may be more: then set parallel.data)"
    raise UserError(
        f"train.profile.ranks: rank{'s' * (len(beyond) > 1)} {', '.join(map(str, beyond))}, but the run has {size:,}"
        f"{unsaid}; expected ranks from 0 to {size - 1}"
    )


def check_steps(wanted: ProfileSettings | None, steps: int) -> None:
    """The run has the steps.

    Args:
        steps: of the whole run.

    Raises:
        UserError: it ends before the last of them.
    """
    if wanted and wanted.last > steps:
        raise UserError(
            f"train.profile: {wanted.window}, but the run has {steps:,} (train.steps or train.epochs); expected "
            f"train.profile.step + train.profile.steps - 1 to be at most that"
        )
