"""Models for what wants 16 bits."""

from __future__ import annotations

import torch

from tests.lib import families


def make_model(directory: str, name: str) -> None:
    """Saves one of the families' models, with heads that a fused attention takes, or ``wide``: a Llama whose matrices, halved,
    still are of whole 128 x 128 blocks."""
    if name != "wide":
        families.make_language_model(directory, name, head=16)
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=509, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=256, initializer_range=0.06,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
