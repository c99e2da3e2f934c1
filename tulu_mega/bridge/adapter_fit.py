"""Whether a directory of low-rank adapters goes with a model, and what is to be said of it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tulu_mega.bridge.adapters import adapter_family
from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.families.reward import reward_fields
from tulu_mega.bridge.files.peft import open_adapter, settings_of
from tulu_mega.bridge.rules import Config
from tulu_mega.config.lora import LoraSettings
from tulu_mega.errors import UserError


def fitting(path: str, config: Config, reward: bool, setting: str = "adapter") -> LoraSettings:
    """What a directory says of its adapters, which are the model's.

    Args:
        config: the model's config.json.
        reward: whether the model is a reward model, or one is to be made of it.
        setting: name of the setting that names the directory.

    Raises:
        UserError: with everything that is wrong with the directory, or does not fit the model.
    """
    lora, family = settings_of(path), family_for(config)
    if reward and not family.reward:
        config = {**config, **reward_fields(family, config)}
        family = family_for(config)
    thin = adapter_family(family, lora, config)
    if not thin.rules:
        raise UserError(f"{path}: its target_modules = {lora.targets!r} match no matrix of the model's")
    with contextlib.closing(open_adapter(path)[1]) as files:
        wrong = files.check(thin.hf_shapes(config))
    if of_a_reward_model(path) and not family.reward:
        wrong = [f"{path}: is a reward model's, and the model here is a language model"]
    if wrong:
        raise UserError([*wrong, f"{setting} = {path!r} does not belong to the model; name one that was made for it"])
    return lora


def of_a_reward_model(path: str) -> bool:
    """Whether a directory's adapters, and the head beside them, make a reward model of a language model.

    Raises:
        UserError: it cannot be read.
    """
    told, files = open_adapter(path)
    files.close()
    return told.get("task_type") == "SEQ_CLS"


def remarks(path: str, model: str, setting: str = "adapter") -> list[str]:
    """Lines about what a directory says and nobody here does.

    Args:
        model: directory or hub name of the model that the adapters are put beside.
        setting: as for `fitting`.
    """
    told, files = open_adapter(path)
    files.close()
    base, dropout = told.get("base_model_name_or_path"), told.get("lora_dropout")
    lines = []
    if base and Path(base).expanduser().resolve() != Path(model).expanduser().resolve():
        lines.append(f"{setting} = {path}: was made for {base}; here it goes with model.path = {model}")
    if dropout:
        lines.append(f"{setting} = {path}: was trained with lora_dropout = {dropout}; here nothing is dropped")
    return lines
