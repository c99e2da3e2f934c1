"""Qwen 2 and 2.5 (Qwen2ForCausalLM): biases on queries, keys and values; the later layers may have a sliding window."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tulu_mega.bridge.families import decoder
from tulu_mega.bridge.rules import Config, Family, LayerNeeds
from tulu_mega.errors import UserError


def windows(config: Config) -> LayerNeeds:
    """The sliding windows of Qwen 2 and 3. Raises UserError for layers they do not have."""
    used = config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None
    first = config.get("max_window_layers", 28)
    if used and type(first) is not int:
        raise UserError(f"config.json: max_window_layers = {str(first)[:100]}, expected a whole number")
    by_rule = ("sliding_attention" if used and i >= first else "full_attention" for i in range(config["num_hidden_layers"]))
    windowed = tuple(kind == "sliding_attention" for kind in decoder.attention_types(config, by_rule))
    if not used or not any(windowed):  # a layer of that type without a window attends to everything
        return LayerNeeds()
    return LayerNeeds(window=decoder.window(config.get("sliding_window", 4096)), windowed=windowed)


def _needs(config: Config) -> LayerNeeds:
    return replace(windows(config), qkv_bias=True)


RULES = (
    decoder.EMBEDDING,
    decoder.NORM_BEFORE_ATTENTION,
    decoder.QKV,
    decoder.QKV_BIAS,
    decoder.ATTENTION_OUT,
    decoder.NORM_BEFORE_MLP,
    *decoder.MLP,
    *decoder.FINAL,
)
FAMILY = Family("Qwen2ForCausalLM", RULES, partial(decoder.sizes, written=("num_key_value_heads",)), _needs)
