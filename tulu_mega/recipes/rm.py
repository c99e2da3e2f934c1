"""Reward model (Tulu 3, arXiv 2411.15124, section 6.1): a scalar head on the policy's backbone, Bradley-Terry on pairs."""

from __future__ import annotations

from tulu_mega.config import RmSettings
from tulu_mega.launch.launcher import World
from tulu_mega.objectives.reward import RewardObjective
from tulu_mega.train.dataset_run import opened_stage


def run(settings: RmSettings, world: World) -> None:
    """Trains until the last step and exports the model; goes on from the newest checkpoint in the run directory.

    Raises:
        UserError: on every rank, for whatever the user can mend.
    """
    with opened_stage(settings, world, reward=True) as stage:
        loader = stage.loader({"margin_S": stage.store.margins})
        heldout = stage.heldout_store()
        objective = RewardObjective()
        evaluated = stage.heldout(heldout, objective, {"margin_S": heldout.margins}) if heldout else None
        stage.fit(objective, loader, evaluated)
