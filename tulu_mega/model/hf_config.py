"""The model's Hugging Face config: read once, the source of every size."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tulu_mega.config import ModelSettings
from tulu_mega.errors import UserError


def load_config(model: ModelSettings) -> PretrainedConfig:
    """Reads config.json of a model directory or hub name.

    Raises:
        UserError: when there is none, or transformers cannot make sense of it.
    """
    path = Path(model.path)
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(f"model.path = {model.path}: no config.json there; give the directory of a Hugging Face model")
    try:
        return AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except json.JSONDecodeError as error:
        raise UserError(f"{path / 'config.json'}: not valid JSON: {error}") from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.path = {model.path}: cannot be loaded as a Hugging Face model: {reason}") from None


def rope_frequencies(config: PretrainedConfig) -> Tensor:
    """Inverse frequencies of rotary embeddings (Su et al., arXiv 2104.09864) under the config's scaling, float32.

    Returns:
        shape [head_dim / 2].

    Raises:
        UserError: for a scaling that also scales attention, which only some families have.
    """
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, head_dim(config), 2, dtype=torch.int64).float() / head_dim(config)
        return 1.0 / (rope["rope_theta"] ** exponents)
    if kind not in ("linear", "llama3"):
        raise UserError(f"rope_type {kind!r} of the model's config is not supported; supported: default, linear, llama3")
    frequencies, _attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies


def head_dim(config: PretrainedConfig) -> int:
    """Channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
