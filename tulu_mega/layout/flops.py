"""Floating-point operations of training, from a model's config.json and the lengths of its sequences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tulu_mega.bridge.families import family_for


def head_columns(config: Mapping[str, Any]) -> int:
    """Columns of the output layer: the vocabulary, or one of a reward model.

    Args:
        config: Hugging Face's config.json.

    Raises:
        UserError: for a family that is not known.
    """
    return 1 if family_for(config).reward else config["vocab_size"]


def matmul_parameters(config: Mapping[str, Any]) -> int:
    """Parameters a token is multiplied with: all of a decoder but the input embedding (tied or not), norms and biases.

    Args:
        config: Hugging Face's config.json.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    attention = hidden * queries * 2 + hidden * keys * 2
    mlp = 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * (attention + mlp) + hidden * head_columns(config)


def training_flops(config: Mapping[str, Any], lengths: Iterable[int], frozen: bool = False) -> float:
    """FLOPs of one forward and backward pass over sequences that attend causally within themselves.

    ``6 (N - embedding) tokens + 6 L h sum(length ** 2)``: every parameter is multiplied and added once forward and twice
    backward; scores and their application to the values are 4 h n^2 forward, half of that under the causal mask, three times
    with the backward pass. In layers with a window w, n^2 is n^2 - (n - w)^2 of a longer sequence. Recomputed activations are not
    counted: they are a cost, not work done.

    Args:
        config: Hugging Face's config.json.
        lengths: real tokens of each sequence; padding is no work.
        frozen: whether the weights have no gradients, so that each is multiplied and added once backward. The work of adapters
            beside them is not counted.

    Raises:
        UserError: for a family that is not known.
    """
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    width = heads * (config.get("head_dim") or hidden // heads)
    needs = family_for(config).needs(config)
    windowed = sum(needs.windowed)
    tokens = squares = 0
    for length in map(int, lengths):
        tokens += length
        squares += layers * length**2
        if windowed and length > needs.window:
            squares -= windowed * (length - needs.window) ** 2
    return (4.0 if frozen else 6.0) * matmul_parameters(config) * tokens + 6.0 * width * squares
