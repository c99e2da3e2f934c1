"""Attention of many spans behind one signature: FlashAttention 3 and 2 and torch's varlen in one call, SDPA span by span."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Spans(NamedTuple):
    """Groups of neighbouring queries and the keys that they may attend to: P spans, in the order of the queries."""

    cu_queries_P1: Tensor
    """int32 boundaries of the spans' queries"""
    cu_keys_P1: Tensor
    """int32 boundaries of the spans' keys"""
    queries_P: tuple[int, ...]
    """number of queries of each span, on the host"""
    keys_P: tuple[int, ...]

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Return the arguments of the fused kernels: boundaries of queries and of keys, and the most queries and keys of a
        span."""
        return self.cu_queries_P1, self.cu_keys_P1, max(self.queries_P), max(self.keys_P)


def attend(
    kernel: Literal["flash3", "flash2", "varlen", "sdpa"],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    reach: int | None,
    scale: float | None,
) -> Tensor:
    """Causal attention within each span; its last query is as far as its last key.

    Args:
        query: [queries, heads, head_dim]; for all but ``sdpa`` bf16 or fp16, on CUDA.
        key, value: [keys, key-value heads, head_dim].
        reach: tokens that a query sees to the left of itself; None, all of its span's.
        scale: of the products; None, ``head_dim ** -0.5``.

    Returns:
        [queries, heads, head_dim].
    """
    if kernel == "sdpa":
        return _span_by_span(query, key, value, spans, reach, scale)
    window = (-1 if reach is None else reach, 0)
    if kernel == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        groups = {"enable_gqa": True}
        if not _knows_groups(varlen_attn):  # torch 2.11 promises nothing where keys have fewer heads than queries
            groups = {}
            key, value = (_for_each_query_head(x, query) for x in (key, value))
        return varlen_attn(query, key, value, *spans.bounds, scale=scale, window_size=window, **groups)
    if kernel == "flash3":
        from flash_attn_interface import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func
    attended = flash_attn_varlen_func(
        query,
        key,
        value,
        *spans.bounds,
        softmax_scale=scale,
        causal=True,
        window_size=window,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return attended[0] if isinstance(attended, tuple) else attended  # FlashAttention 3's first releases add the log-sum-exp


@functools.cache
def _knows_groups(varlen_attn: Callable) -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _span_by_span(query: Tensor, key: Tensor, value: Tensor, spans: Spans, reach: int | None, scale: float | None) -> Tensor:
    outputs = []
    if query.device.type == "cuda":  # with fewer heads, float32 and masks are left to plain products, of all scores at once
        key, value = (_for_each_query_head(x, query) for x in (key, value))
    groups = key.shape[1] != query.shape[1]
    # split, not slices: backward puts the parts side by side, where every slice would add a gradient of the whole pack
    keys = spans.keys_P
    for parts in zip(query.split(spans.queries_P), key.split(keys), value.split(keys), strict=True):
        rows, seen = len(parts[0]), len(parts[1])
        plain = rows == seen and (reach is None or rows <= reach + 1)  # SDPA's own causal mask serves
        heads_first = (part.transpose(0, 1).unsqueeze(0) for part in parts)
        mask = None if plain else _mask(rows, seen, reach, query.device)
        attended = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=groups)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def _for_each_query_head(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values, [keys, key-value heads, head_dim], with as many heads as there are of queries."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _mask(queries: int, keys: int, reach: int | None, device: torch.device) -> Tensor:
    """[queries, keys], True where a query may look: at itself, backwards, no further than `reach`."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if reach is None else seen.triu(keys - queries - reach)
