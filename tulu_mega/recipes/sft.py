"""Supervised fine-tuning (Tulu 3, arXiv 2411.15124, section 4): packed conversations, loss on the assistant's turns."""

from __future__ import annotations

from tulu_mega.config import SftSettings
from tulu_mega.launch.launcher import World
from tulu_mega.objectives.sft import HeldOutLikelihood, SftObjective
from tulu_mega.train.dataset_run import opened_run


def run(settings: SftSettings, world: World) -> None:
    """Trains until the last step and exports the model; goes on from the newest checkpoint in the run directory.

    Raises:
        UserError: on every rank, for whatever the user can mend.
    """
    with opened_run(settings, world) as training:
        heldout = training.heldout_store()
        evaluated = training.heldout(heldout, HeldOutLikelihood()) if heldout else None
        training.fit(SftObjective(settings.train.reduction), training.loader(), evaluated)
