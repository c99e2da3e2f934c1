"""Settings of `tulu-mega sft`, and the work of one of its steps."""

from __future__ import annotations

from typing import Annotated

from tulu_mega.config.effects import Effect
from tulu_mega.config.run import StageSettings
from tulu_mega.config.sections import HeldOutSettings, SftTrainSettings
from tulu_mega.config.workload import Workload, of_rows

MEAN_LENGTH = 560
"""Tokens of a conversation of Tulu 3's SFT mixture: 256 make about 35 packs of 4,096."""


class SftSettings(StageSettings):
    """`tulu-mega sft`: supervised fine-tuning."""

    train: SftTrainSettings = SftTrainSettings()
    heldout: Annotated[HeldOutSettings | None, Effect.NONE] = None
    """Conversations to evaluate on while training: their mean loss per supervised token."""


def workload(settings: SftSettings) -> Workload:
    """Each conversation once."""
    return of_rows(settings, MEAN_LENGTH)
