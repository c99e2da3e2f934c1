"""The model families that can be read and written; a new one is a file here and a line below."""

from __future__ import annotations

from tulu_mega.bridge.families import llama, mistral, olmo2, olmo3, qwen2, qwen3
from tulu_mega.bridge.families.reward import reward_family
from tulu_mega.bridge.rules import Config, Family
from tulu_mega.errors import UserError

FAMILIES: dict[str, Family] = {each.FAMILY.architecture: each.FAMILY for each in (llama, mistral, olmo2, olmo3, qwen2, qwen3)}
REWARD_FAMILIES: dict[str, Family] = {each.architecture: each for each in map(reward_family, FAMILIES.values())}


def family_for(config: Config) -> Family:
    """The family that a config.json names in ``architectures``.

    Raises:
        UserError: naming what is supported, when the model is of another family.
    """
    named = config.get("architectures") or []
    for architecture in named:
        if found := FAMILIES.get(architecture) or REWARD_FAMILIES.get(architecture):
            return found
    raise UserError(
        f"config.json: architectures = {named!r} is not supported; expected one of {', '.join(sorted(FAMILIES))}, "
        "or ...ForSequenceClassification of these for a reward model"
    )
