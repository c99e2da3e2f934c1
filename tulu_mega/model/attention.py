"""Attention for layers that do not use Transformer Engine's: packed sequences, sliding windows, context parallelism."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from tulu_mega.errors import UserError
from tulu_mega.layout.context import context_rows
from tulu_mega.model.attention_choice import Attention
from tulu_mega.model.packed import PlacedSeqParams
from tulu_mega.model.varlen import Spans, attend
from tulu_mega.records import sent


class PackedAttention(torch.nn.Module):
    """Causal grouped-query attention within each segment of a packed row.

    Layers that megatron-core's config gives a window (``window_size``, ``window_attn_skip_freq``) see that many tokens to the
    left. Under context parallelism keys and values are gathered from all ranks and this rank's queries attend to them.

    Args:
        kernel: see `varlen.attend`.
        The rest is what megatron-core gives to every core attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        kernel: Attention = "sdpa",
        **_unused,
    ):
        super().__init__()
        if config.attention_dropout:
            raise UserError(
                f"[megatron] attention_dropout = {config.attention_dropout}: this attention has no dropout; set it to 0"
            )
        self.kernel = kernel
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        left = config.window_size[0] if windowed else -1
        self.reach = left if left >= 0 else None
        self.scale = softmax_scale
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PlacedSeqParams | None = None,
    ) -> Tensor:
        """
        Args:
            query: [T, heads, head_dim].
            key, value: [T, key-value heads, head_dim].

        Returns:
            [T, 1, heads * head_dim].
        """
        rank, size = self.context_group.rank(), self.context_group.size()
        spans, rows = packed_seq_params.spans, packed_seq_params.key_rows_K
        if size > 1:
            lengths_S = spans.queries_P
            key, value = self._whole_pack(key, value, lengths_S, size)
            spans, rows = _spans(lengths_S, rank, size, self.reach, query.device)
        if rows is not None:
            key, value = key.index_select(0, rows), value.index_select(0, rows)
        return attend(self.kernel, query, key, value, spans, self.reach, self.scale).reshape(query.shape[0], 1, -1)

    def _whole_pack(self, key: Tensor, value: Tensor, lengths_S: tuple[int, ...], size: int) -> list[Tensor]:
        """Gather keys and values of all ranks in the pack's own order; the backward pass sums the gradients of all ranks."""
        held = torch.cat((key, value), dim=1)
        gathered = gather_from_sequence_parallel_region(held, tensor_parallel_output_grad=True, group=self.context_group)
        places = _places(lengths_S, size, key.device)
        return gathered.index_select(0, places).split((key.shape[1], value.shape[1]), dim=1)


def by_segments(core: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Return a subclass of one of megatron-core's core attentions that reads the segments of a `PlacedSeqParams`."""

    class BySegments(core):
        def forward(self, *args, packed_seq_params: PlacedSeqParams, **kwargs) -> Tensor:
            return super().forward(*args, packed_seq_params=packed_seq_params.segments, **kwargs)

    return BySegments


class _Piece(NamedTuple):
    """Neighbouring queries and the keys they may attend to."""

    rows: int
    """queries"""
    begin: int
    """first key, in the pack"""
    end: int
    """after the last key, which is the last query's own"""


def _pieces(lengths_S: tuple[int, ...], rank: int, size: int, reach: int | None) -> list[_Piece]:
    """Return a rank's pieces, in the order in which it holds their queries."""
    pieces = []
    for segment, length in zip(accumulate(lengths_S, initial=0), lengths_S, strict=False):
        count = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            first = segment + number * count
            begin = segment if reach is None else max(segment, first - reach)
            pieces.append(_Piece(count, begin, first + count))
    return pieces


@lru_cache(maxsize=64)
def _places(lengths_S: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """Return the place of each row of the pack in the concatenation of all ranks' shares."""
    places = torch.cat([context_rows(lengths_S, rank, size) for rank in range(size)]).argsort()
    return sent(places, device)


@lru_cache(maxsize=64)
def _spans(lengths_S: tuple[int, ...], rank: int, size: int, reach: int | None, device: torch.device) -> tuple[Spans, Tensor]:
    """Return the pieces as spans, and the rows of the pack that are their keys; keys of two pieces are listed twice."""
    pieces = _pieces(lengths_S, rank, size, reach)
    queries, keys = tuple(piece.rows for piece in pieces), tuple(piece.end - piece.begin for piece in pieces)
    rows = torch.cat([torch.arange(piece.begin, piece.end) for piece in pieces])
    bounds = (torch.tensor([0, *accumulate(counts)], dtype=torch.int32) for counts in (queries, keys))
    cu_queries, cu_keys, rows = (sent(each, device) for each in (*bounds, rows))
    return Spans(cu_queries, cu_keys, queries, keys), rows
