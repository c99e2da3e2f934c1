"""The model families that can be read and written. A new one is a file in this folder that defines `FAMILY`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from tulu_mega.bridge.families.reward import reward_family
from tulu_mega.bridge.rules import Config, Family
from tulu_mega.errors import UserError

_MODULES = [import_module(f"{__name__}.{each.name}") for each in iter_modules(__path__)]
FAMILIES: dict[str, Family] = {each.FAMILY.architecture: each.FAMILY for each in _MODULES if hasattr(each, "FAMILY")}
REWARD_FAMILIES: dict[str, Family] = {each.architecture: each for each in map(reward_family, FAMILIES.values())}


def family_for(config: Config) -> Family:
    """The family that a config.json names in ``architectures``.

    Raises:
        UserError: naming what is supported, when the model is of another family.
    """
    named = config.get("architectures") or []
    for architecture in named if isinstance(named, list | tuple) else ():
        if isinstance(architecture, str) and (found := FAMILIES.get(architecture) or REWARD_FAMILIES.get(architecture)):
            return _of_its_type(found, config)
    raise UserError(
        f"config.json: architectures = {str(named)[:200]} is not supported; expected one of {', '.join(sorted(FAMILIES))}, "
        "or ...ForSequenceClassification of these for a reward model"
    )


def _of_its_type(family: Family, config: Config) -> Family:
    """The family, whose layers transformers builds too: it goes by ``model_type``, vLLM and we by ``architectures``."""
    expected = family.model_type or family.architecture.partition("For")[0].lower()
    if (kind := config.get("model_type", expected)) != expected:
        raise UserError(
            f"config.json: architectures = {family.architecture}, but model_type = {str(kind)[:100]!r}, expected {expected!r}; "
            "transformers goes by the latter, others by the former. Correct one of them"
        )
    return family
