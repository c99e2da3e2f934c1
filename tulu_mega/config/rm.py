"""Settings of `tulu-mega rm`, and the work of one of its steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tulu_mega.config.run import OnePass, PreferenceStageSettings
from tulu_mega.config.sections import OptimSettings, PositiveInt, PreferenceDataSettings
from tulu_mega.config.workload import Workload, of_pairs


class _RmData(PreferenceDataSettings):
    overlong: Literal["truncate", "reject"] = "reject"
    """Pairs with a side longer than `max_length`: cut on the right, or left out (Tulu 3)."""


class _RmTrain(OnePass):
    global_batch: PositiveInt = 256
    """Pairs in an optimizer step, over all ranks."""


class _RmOptim(OptimSettings):
    lr: Annotated[float, Field(ge=0)] = 3e-6
    """Peak learning rate."""


class RmSettings(PreferenceStageSettings):
    """`tulu-mega rm`: a reward model from pairs (Bradley-Terry)."""

    data: _RmData
    train: _RmTrain = _RmTrain()
    optim: _RmOptim = _RmOptim()


def workload(settings: RmSettings) -> Workload:
    """Pairs."""
    return of_pairs(settings)
