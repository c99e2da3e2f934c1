"""OLMo 3 (Olmo3ForCausalLM): OLMo 2's layers, three of four with a sliding window and a RoPE of their own."""

from __future__ import annotations

from tulu_mega.bridge.families import decoder, olmo2
from tulu_mega.bridge.rules import Config, Family, LayerNeeds


def _needs(config: Config) -> LayerNeeds:
    every_fourth = ("sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(config["num_hidden_layers"]))
    types = decoder.attention_types(config, every_fourth)
    windowed = tuple(kind == "sliding_attention" for kind in types)
    size = config.get("sliding_window", 4096)
    return LayerNeeds(
        qk_norm="projection",
        norms="after",
        window=decoder.window(size) if any(windowed) else None,
        windowed=windowed if any(windowed) else (),
        ropes=types,
    )


FAMILY = Family("Olmo3ForCausalLM", olmo2.RULES, decoder.sizes, _needs)
