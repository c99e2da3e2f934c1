"""What is wrong with low-rank adapters that a run is to train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tulu_mega.bridge.adapters import adapted, adapter_family
from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.families.reward import reward_fields
from tulu_mega.bridge.files.peft import open_adapter, settings_of
from tulu_mega.config import RunSettings
from tulu_mega.errors import UserError
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
    if config and findings.collect(lambda: _of_the_model(path, config, reward)):
        findings.notes += _told(path, settings.model.path)
        run.pin(findings, "lora.adapter", Directory(path))


def _told(path: str, model: str) -> list[str]:
    """Lines about what the adapters' directory says and the run does not do."""
    told, _files = open_adapter(path)
    base, dropout = told.get("base_model_name_or_path"), told.get("lora_dropout")
    lines = []
    if base and Path(base).expanduser().resolve() != Path(model).expanduser().resolve():
        lines.append(f"lora.adapter = {path}: was made for {base}; here it goes with model.path = {model}")
    if dropout:
        lines.append(f"lora.adapter = {path}: was trained with lora_dropout = {dropout}; here nothing is dropped")
    return lines


def _of_the_model(path: str, config: Mapping[str, Any], reward: bool) -> bool:
    lora, family = settings_of(path), family_for(config)
    if reward and not family.reward:
        config = {**config, **reward_fields(family, config)}
        family = family_for(config)
    thin = adapter_family(family, lora, config)
    if wrong := open_adapter(path)[1].check(thin.hf_shapes(config)):
        raise UserError([*wrong, f"lora.adapter = {path!r} does not belong to the model; name one that was made for it"])
    return True
