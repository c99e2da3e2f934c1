"""Reward model (Tulu 3, arXiv 2411.15124, section 6.1): a scalar head on the policy's backbone, Bradley-Terry on pairs."""

from __future__ import annotations

from tulu_mega.config import RmSettings
from tulu_mega.launch.launcher import World
from tulu_mega.objectives.reward import RewardObjective
from tulu_mega.train.dataset_run import opened_run


def run(settings: RmSettings, world: World) -> None:
    """Trains until the last step and exports the model; goes on from the newest checkpoint in the run directory.

    Raises:
        UserError: on every rank, for whatever the user can mend.
    """
    with opened_run(settings, world, reward=True) as training:
        loader = training.loader({"margin_S": training.store.margins})
        heldout = training.heldout_store()
        objective = RewardObjective()
        evaluated = training.heldout(heldout, objective, {"margin_S": heldout.margins}) if heldout else None
        training.fit(objective, loader, evaluated)
