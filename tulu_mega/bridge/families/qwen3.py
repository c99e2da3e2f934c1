"""Qwen 3, dense (Qwen3ForCausalLM): queries and keys are normed head by head; the head size is its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tulu_mega.bridge.families import decoder, qwen2
from tulu_mega.bridge.rules import Config, Family, LayerNeeds


def _needs(config: Config) -> LayerNeeds:
    return replace(qwen2.windows(config), qk_norm="head")


RULES = (
    decoder.EMBEDDING,
    decoder.NORM_BEFORE_ATTENTION,
    decoder.QKV,
    *decoder.HEAD_NORMS,
    decoder.ATTENTION_OUT,
    decoder.NORM_BEFORE_MLP,
    *decoder.MLP,
    *decoder.FINAL,
)
FAMILY = Family("Qwen3ForCausalLM", RULES, partial(decoder.sizes, written=("num_key_value_heads", "head_dim")), _needs)
