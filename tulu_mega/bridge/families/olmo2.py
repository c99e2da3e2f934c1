"""OLMo 2 (Olmo2ForCausalLM): norms after attention and MLP, queries and keys normed over their whole projection."""

from __future__ import annotations

from tulu_mega.bridge.families import decoder
from tulu_mega.bridge.rules import Config, Family, LayerNeeds


def _needs(config: Config) -> LayerNeeds:
    return LayerNeeds(qk_norm="projection", norms="after")


RULES = (
    decoder.EMBEDDING,
    decoder.QKV,
    *decoder.PROJECTION_NORMS,
    decoder.ATTENTION_OUT,
    decoder.NORM_AFTER_ATTENTION,
    *decoder.MLP,
    decoder.NORM_AFTER_MLP,
    *decoder.FINAL,
)
FAMILY = Family("Olmo2ForCausalLM", RULES, decoder.sizes, _needs)
