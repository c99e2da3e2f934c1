"""Mistral (MistralForCausalLM): a Llama that may attend within a sliding window."""

from __future__ import annotations

from functools import partial

from tulu_mega.bridge.families import decoder, llama
from tulu_mega.bridge.rules import Config, Family, LayerNeeds


def _needs(config: Config) -> LayerNeeds:
    size = config.get("sliding_window", 4096)
    if size is None:
        return LayerNeeds()
    return LayerNeeds(window=decoder.window(size), windowed=(True,) * config["num_hidden_layers"])


FAMILY = Family("MistralForCausalLM", llama.RULES, partial(decoder.sizes, written=("num_key_value_heads",)), _needs)
