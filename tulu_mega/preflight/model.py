"""What is wrong with a model, or with this machine for it: of every command that builds a Megatron model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.families.reward import check_language_model
from tulu_mega.bridge.files.config_json import read_config
from tulu_mega.bridge.files.hf_files import HfCheckpoint
from tulu_mega.bridge.files.hub import is_megatron, model_directory
from tulu_mega.bridge.megatron_keys import stored_parameters
from tulu_mega.config import EngineSettings
from tulu_mega.errors import UserError
from tulu_mega.layout.division import layout_problems
from tulu_mega.layout.fp8 import fp8_problems
from tulu_mega.preflight.findings import Findings


def problems(settings: EngineSettings, findings: Findings) -> None:
    """Find problems of a command that takes a language model."""
    any_model_problems(settings, findings)
    if config := findings.config:
        findings.collect(lambda: check_language_model(settings.model.path, config["architectures"]))


def any_model_problems(settings: EngineSettings, findings: Findings) -> None:
    """Find problems of a command that takes a language or a reward model; add the model's config.json to the findings."""
    findings.collect(lambda: _fp8(settings))
    findings.config = findings.collect(lambda: model_config(settings))


def _fp8(settings: EngineSettings) -> None:
    """This machine can train in FP8, if that is asked for."""
    if settings.precision.recipe is None:
        return
    from tulu_mega.platforms.fp8 import obstacles, this_machine

    if problems := obstacles(settings.precision.recipe, this_machine()):
        raise UserError(problems)


def model_config(settings: EngineSettings) -> dict[str, Any]:
    """The model's config.json, its weights found whole and of the shapes that it asks for, dividing by the layout.

    Raises:
        UserError: with everything that is not so.
    """
    directory = model_directory(settings.model.path)
    if is_megatron(directory):
        config, problems = _converted(directory)
    else:
        checkpoint = HfCheckpoint.open(directory)
        config = checkpoint.config
        family = family_for(config)
        problems = checkpoint.check(family.hf_shapes(config), family.ignorable(config))
        problems = problems or checkpoint.check_tied(family.tied(config))
    undivided = layout_problems(config, settings.parallel)
    problems += undivided or fp8_problems(config, settings)
    if problems:
        raise UserError(problems)
    return config


def _converted(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """config.json of a Megatron distributed checkpoint, and what of its tensors does not go with it."""
    from tulu_mega.bridge.files.megatron_files import MegatronCheckpoint

    checkpoint = MegatronCheckpoint.open(directory)
    config = read_config(directory, "train from a directory that tulu-mega convert made, which has it")
    return config, checkpoint.check(stored_parameters(family_for(config), config))


def within_vocabulary(name: str, token: int, config: Mapping[str, Any]) -> None:
    """Sees whether a token is of the model's vocabulary. Raises UserError where it is not."""
    if token >= config["vocab_size"]:
        raise UserError(
            f"{name} holds token {token}, but the model's vocabulary has {config['vocab_size']} entries; "
            "data and tokenizer belong to another model"
        )
