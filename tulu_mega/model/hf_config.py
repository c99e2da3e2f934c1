"""The model's Hugging Face config: read once, the source of every size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.rules import LayerNeeds
from tulu_mega.config import ModelSettings
from tulu_mega.errors import UserError

_COUNTED = re.compile(r"layer|label|block|depth")
_MOST = 10_000


def load_config(model: ModelSettings) -> PretrainedConfig:
    """Reads config.json of a model directory or hub name.

    Raises:
        UserError: when there is none, transformers cannot make sense of it, or would count to numbers that no model has.
    """
    path = Path(model.path)
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(f"model.path = {model.path}: no config.json there; give the directory of a Hugging Face model")
    try:
        content, _ = PretrainedConfig.get_config_dict(model.path)
        if endless := [f"{name} = {str(value)[:100]}" for name, value in _fields(content) if _endless(name, value)]:
            raise ValueError(f"config.json: {', '.join(endless)}; expected at most {_MOST}")
        return AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except json.JSONDecodeError as error:
        raise UserError(f"{path / 'config.json'}: not valid JSON: {error}") from None
    except Exception as error:  # of transformers and huggingface_hub, whatever they find wrong with a field
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"model.path = {model.path}: cannot be loaded as a Hugging Face model: {reason}") from None


def _fields(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield names and values, those of nested configs included."""
    for name, value in content.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from _fields(value)


def _endless(name: str, value: Any) -> bool:
    """Return whether transformers would make a list of this length that is longer than any model needs."""
    return isinstance(value, int) and value > _MOST and _COUNTED.search(name) is not None


def layer_needs(config: PretrainedConfig) -> LayerNeeds:
    """Return what the model's family needs in its layers, with transformers' defaults filled in.

    Raises:
        UserError: for a family that is not known.
    """
    content = config.to_dict()
    return family_for(content).needs(content)


def head_dim(config: PretrainedConfig) -> int:
    """Channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
