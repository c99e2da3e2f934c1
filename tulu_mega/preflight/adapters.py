"""What is wrong with low-rank adapters that a run is to train."""

from __future__ import annotations

from tulu_mega.bridge.adapter_fit import fitting, remarks
from tulu_mega.bridge.adapters import adapted
from tulu_mega.bridge.families import family_for
from tulu_mega.config import RunSettings
from tulu_mega.layout.blocks import block_problems
from tulu_mega.pins.directories import Directory
from tulu_mega.preflight import run
from tulu_mega.preflight.findings import Findings


def problems(settings: RunSettings, findings: Findings, reward: bool = False) -> None:
    """Of new adapters, which have a matrix each, and of those that the run begins with, which are the model's; these are pinned.

    Args:
        reward: it trains a reward model.
    """
    lora, config = settings.lora, findings.config
    if not lora:
        return
    if config:
        findings.problems += block_problems(config, lora, settings.parallel)
    if not lora.adapter:
        if config:
            findings.problems += [f"lora.{each}" for each in lora.unmatched(adapted(family_for(config), config))]
        return
    path = lora.adapter
    if config and findings.collect(lambda: fitting(path, config, reward, "lora.adapter")):
        findings.notes += remarks(path, settings.model.path, "lora.adapter")
        run.pin(findings, "lora.adapter", Directory(path))
