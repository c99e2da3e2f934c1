"""Llama (LlamaForCausalLM): Tulu 3, Llama 2 and 3."""

from __future__ import annotations

from tulu_mega.bridge.families import decoder
from tulu_mega.bridge.rules import Family

RULES = (
    decoder.EMBEDDING,
    decoder.NORM_BEFORE_ATTENTION,
    decoder.QKV,
    decoder.ATTENTION_OUT,
    decoder.NORM_BEFORE_MLP,
    *decoder.MLP,
    *decoder.FINAL,
)
FAMILY = Family("LlamaForCausalLM", RULES, decoder.sizes)
