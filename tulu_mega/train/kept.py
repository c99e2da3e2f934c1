"""Which checkpoints of a run stay, and which one it goes on from."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from tulu_mega.errors import UserError
from tulu_mega.train.checkpoint import Checkpoint, find


def newest(directory: Path) -> Checkpoint | None:
    """The complete checkpoint in a directory that a run goes on from: the newest whose weights are finite.

    Raises:
        UserError: there are checkpoints, and no weights are finite.
    """
    found = find(directory)
    usable = [checkpoint for checkpoint in found if checkpoint.finite]
    if found and not usable:
        raise UserError(
            f"{directory}: the weights of every checkpoint ({_named(found)}) have NaN or infinity in them, from which nothing "
            "can be learned; begin anew in another run_dir, with a lower optim.lr or another model"
        )
    return usable[-1] if usable else None


def before(directory: Path, chosen: Checkpoint) -> str | None:
    """Name of the checkpoint that a run would go on from if the chosen one were not there."""
    earlier = [each for each in find(directory) if each.finite and each.step < chosen.step]
    return earlier[-1].path.name if earlier else None


def advice(directory: Path, chosen: Checkpoint) -> str:
    """Return a warning about the checkpoint of `newest` that a run goes on from; an empty text where all is well."""
    found = find(directory)
    if passed := [checkpoint for checkpoint in found if checkpoint.step > chosen.step]:
        return f"the weights of {_named(passed)} have NaN or infinity in them: going on from {chosen.path.name}"
    healthy = [checkpoint for checkpoint in found if checkpoint.healthy]
    if healthy and not chosen.healthy:
        later = [checkpoint for checkpoint in found if checkpoint.step > healthy[-1].step]
        return (
            f"{chosen.path} was saved in the middle of updates that were left out, since loss or gradient was not finite; to go "
            f"on from {healthy[-1].path.name} instead, which is from before them, remove {_named(later)}"
        )
    return ""


def prune(directory: Path, keep: int, step: int) -> None:
    """Removes old checkpoints, and later ones of a run that was put back.

    Args:
        keep: the newest that stay. So does the newest that is healthy: a streak of NaN may be longer than they reach.
        step: of the checkpoint that was just saved.
    """
    found = find(directory)
    own = [checkpoint for checkpoint in found if checkpoint.step <= step]
    stay = {checkpoint.step for checkpoint in own[-keep:]}
    stay |= {checkpoint.step for checkpoint in [each for each in own if each.healthy][-1:]}
    for checkpoint in found:
        if checkpoint.step not in stay:
            shutil.rmtree(checkpoint.path, ignore_errors=True)


def _named(checkpoints: Collection[Checkpoint]) -> str:
    return ", ".join(checkpoint.path.name for checkpoint in checkpoints)
