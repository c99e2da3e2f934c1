"""What is wrong with a run that trains, whatever it trains on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tulu_mega.bridge.files.hub import model_directory
from tulu_mega.config import RunSettings
from tulu_mega.data.other_tokenizer import other_tokenizer
from tulu_mega.launch.run_dir import check_free
from tulu_mega.pins.directories import Directory
from tulu_mega.preflight import model, pinned, profile
from tulu_mega.preflight.findings import Findings
from tulu_mega.preflight.same_run import same_run


def problems(settings: RunSettings, findings: Findings, reward: bool = False, short_batches: bool = False) -> None:
    """Find problems of the model, the run directory and the tokenizer.

    Args:
        reward: it trains a reward model, and may begin with one.
        short_batches: as for `same_run`.
    """
    if reward:
        model.any_model_problems(settings, findings)
    else:
        model.problems(settings, findings)
    findings.collect(lambda: profile.check_ranks(settings))
    findings.collect(lambda: check_free(Path(settings.run_dir)))
    findings.collect(lambda: same_run(settings, short_batches))
    findings.collect(lambda: pinned.begin(settings, findings))
    pin(findings, "model.path", Directory(settings.model.path, code=settings.model.trust_remote_code))
    if settings.data.tokenizer:
        code = settings.model.trust_remote_code
        pin(findings, "data.tokenizer", Directory(settings.data.tokenizer, weights=False, code=code))
    if (config := findings.config) and settings.data.tokenizer and settings.checkpoint.export:
        findings.collect(lambda: _goes_with_the_model(settings, config, reward))


def pin(findings: Findings, setting: str, directory: Directory) -> None:
    """Pins a directory that a setting names, where the run's pins can be used."""
    if findings.pins:
        findings.collect(lambda: pinned.directory(findings, setting, directory))


def _goes_with_the_model(settings: RunSettings, config: Mapping[str, Any], reward: bool) -> None:
    """What exporting `data.tokenizer` with the model would find out in rank 0."""
    directory = model_directory(settings.model.path)
    other_tokenizer(settings.data.tokenizer, directory, config, reward, settings.model.trust_remote_code)
