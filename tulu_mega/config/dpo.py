"""Settings of `tulu-mega dpo`, and the work of one of its steps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from tulu_mega.config.effects import Effect
from tulu_mega.config.preference import PreferenceSettings
from tulu_mega.config.run import PreferenceStageSettings
from tulu_mega.config.sections import Fraction, OptimSettings, ReferenceSettings
from tulu_mega.config.workload import Workload, of_pairs


class _DpoOptim(OptimSettings):
    lr: Annotated[float, Field(ge=0)] = 5e-7
    """Peak learning rate."""
    warmup: Fraction = 0.1
    """Share of the steps in which the rate rises linearly from 0."""


class DpoSettings(PreferenceStageSettings):
    """`tulu-mega dpo`: preference tuning of a policy."""

    optim: _DpoOptim = _DpoOptim()
    preference: PreferenceSettings = PreferenceSettings()
    reference: Annotated[ReferenceSettings, Effect.NONE] = ReferenceSettings()

    @model_validator(mode="after")
    def _no_margin(self) -> DpoSettings:
        if self.data.margin is not None:
            raise ValueError(f"data.margin = {self.data.margin!r}: only reward models (tulu-mega rm) learn margins; leave it out")
        return self


def workload(settings: DpoSettings) -> Workload:
    """Pairs; those that compare with a reference have its log-probabilities scored before the first step."""
    return of_pairs(settings, scores_once=settings.preference.reads_reference)
