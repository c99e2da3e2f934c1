"""What is planned: a stage's settings, and the figures of its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.families.reward import reward_fields
from tulu_mega.bridge.files.config_json import read_config
from tulu_mega.bridge.files.hub import config_directory
from tulu_mega.config import ModelSettings, RunSettings, load
from tulu_mega.config.source import parse_toml
from tulu_mega.config.stages import DEFAULT, STAGES
from tulu_mega.config.told import stages_told
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import resolve
from tulu_mega.plan.settings import PlanSettings

_OVERLAID = (
    *("model", "parallel", "data", "train", "optim", "checkpoint", "precision", "lora"),
    *("megatron", "ddp", "optimizer", "rollout", "sampling", "policy", "value", "rewards"),
)


def read_stage(asked: PlanSettings) -> tuple[str, RunSettings]:
    """The stage's name and its settings, flags laid over the file's.

    Raises:
        UserError: with everything that is wrong with file and flags.
    """
    file = asked.config[0]
    stage = asked.stage or _told(file)
    given = asked.model_dump(include=set(_OVERLAID))
    return stage, load(resolve(STAGES[stage].settings), file, [word for name in _OVERLAID for word in _flags(name, given[name])])


def read_architecture(model: ModelSettings, reward: bool) -> dict[str, Any]:
    """config.json of a model. No weights are needed, nor looked at, and neither transformers nor torch is imported.

    Args:
        model: whose path may be a model directory, a directory with nothing but config.json, that file, or a hub name.
        reward: whether a reward model is to be made of it.

    Raises:
        UserError: there is none, or no family can read it.
    """
    path = Path(model.path)
    try:
        directory = config_directory(str(path.parent) if path.name == "config.json" else model.path)
    except UserError as error:
        enough = "a directory with its config.json is enough: --model DIR (examples/architectures has Llama 3.1 and OLMo 2)"
        raise UserError(f"{error.problems[0]}; {enough}") from None
    content = read_config(directory)
    family = family_for(content)
    family.hf_shapes(content)  # says what is missing, or what does not fit together
    return content | reward_fields(family, content) if reward else content


def read_architecture_beside(model: ModelSettings, setting: str, path: str) -> dict[str, Any]:
    """config.json of a value model or a reward model, with a reward model's head whatever the directory has.

    Args:
        model: of the policy, whose further settings are this model's too.
        setting: that names the directory.
        path: as `model.path` may be.

    Raises:
        UserError: as :func:`read_architecture`, about the setting.
    """
    try:
        return read_architecture(model.model_copy(update={"path": path}), reward=True)
    except UserError as error:
        raise UserError(
            [problem.replace("model.path", setting).replace("--model DIR", f"--{setting} DIR") for problem in error.problems]
        ) from None


def _told(file: str) -> str:
    """By sections and settings that only one command has, else by the file's name."""
    try:
        content = parse_toml(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}  # `load` says what is wrong with the file
    if told := stages_told(content, file):
        return told[0]
    if not content:
        return DEFAULT
    raise UserError(f"{file}: it cannot be told which command this is for; add --stage {', --stage '.join(STAGES)}")


def _flags(name: str, value: Any) -> list[str]:
    """Settings that flags gave, as flags again."""
    if isinstance(value, dict):
        return [word for key, inner in value.items() for word in _flags(f"{name}.{key}", inner)]
    return [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
