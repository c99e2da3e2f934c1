"""Attention of many short spans in one call: FlashAttention 3 and 2, and torch's own, behind one signature."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Queries that lie together and the keys they may look at: P spans, end to end, in the order of the queries."""

    cu_queries_P1: Tensor
    """int32 boundaries of the spans' queries"""
    cu_keys_P1: Tensor
    """int32 boundaries of the spans' keys"""
    most_queries: int
    most_keys: int


def attend(
    kernel: Literal["flash3", "flash2", "varlen"],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    reach: int | None,
    scale: float | None,
) -> Tensor:
    """Causal attention within each span; its last query is as far as its last key.

    Args:
        query: [queries, heads, head_dim], bf16 or fp16, on CUDA.
        key, value: [keys, key-value heads, head_dim].
        reach: tokens that a query sees to the left of itself; None, all of its span's.
        scale: of the products; None, ``head_dim ** -0.5``.

    Returns:
        [queries, heads, head_dim].
    """
    window = (-1 if reach is None else reach, 0)
    if kernel == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(query, key, value, *spans, scale=scale, window_size=window, enable_gqa=True)
    if kernel == "flash3":
        from flash_attn_interface import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func
    attended = flash_attn_varlen_func(
        query,
        key,
        value,
        *spans,
        softmax_scale=scale,
        causal=True,
        window_size=window,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return attended[0] if isinstance(attended, tuple) else attended  # FlashAttention 3's first releases add the log-sum-exp
