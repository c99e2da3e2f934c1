"""What is wrong with low-rank adapters that a run is to train."""

from __future__ import annotations

from tulu_mega.bridge.adapter_fit import fitting, remarks
from tulu_mega.config import RunSettings
from tulu_mega.pins.directories import Directory
from tulu_mega.preflight import run
from tulu_mega.preflight.findings import Findings


def problems(settings: RunSettings, findings: Findings, reward: bool = False) -> None:
    """Of adapters that the run begins with, which are the model's; they are pinned.

    Args:
        reward: it trains a reward model.
    """
    if not settings.lora or not settings.lora.adapter:
        return
    path = settings.lora.adapter
    if (config := findings.config) and findings.collect(lambda: fitting(path, config, reward, "lora.adapter")):
        findings.notes += remarks(path, settings.model.path, "lora.adapter")
        run.pin(findings, "lora.adapter", Directory(path))
