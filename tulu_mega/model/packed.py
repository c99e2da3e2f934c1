"""A packed micro-batch's boundaries in the forms that megatron-core and our attention take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from tulu_mega.model.varlen import Spans
from tulu_mega.records import PackedBatch


@dataclass
class PlacedSeqParams(PackedSeqParams):
    """The pack's parameters for megatron-core. They say that the pack is one sequence, whose boundaries are on the host, and give
    the rotary embedding each token's own position. With the true boundaries megatron-core would wait for the device in each
    layer, and would not know that a segment goes on after a shared prefix. Attention reads the segments from here."""

    positions_T: Tensor | None = None
    """int64, of the whole pack's tokens; under context parallelism this rank's are where megatron-core looks for them, the others
    are 0"""
    segments: PackedSeqParams | None = None
    """the whole pack's as megatron-core has them, for Transformer Engine's attention; no prefixes are shared there"""
    spans: Spans | None = None
    """the whole pack's segments for our own attention, and the keys of each"""
    key_rows_K: Tensor | None = None
    """int64, the rows of the pack that are these keys, end to end; None where each segment's keys are its own"""


def packed_seq_params(batch: PackedBatch, context: int = 1, fused_rope: bool = False) -> PlacedSeqParams:
    """Return the parameters that go with a micro-batch through all layers, without waiting for the device.

    Args:
        context: context-parallel ranks that share the pack.
        fused_rope: whether rotary embeddings are Transformer Engine's kernel, which wants the boundaries on the device.
    """
    bounds, longest = batch.cu_seqlens_S1, max(batch.lengths_S)
    shared = batch.key_rows_K is not None
    cu_keys, keys = (batch.cu_keys_S1, batch.key_lengths_S) if shared else (bounds, batch.lengths_S)
    whole = torch.tensor([0, context * len(batch.tokens_T)], dtype=torch.int32)
    if fused_rope:
        whole = whole.to(bounds.device, non_blocking=True)
    return PlacedSeqParams(
        "thd",
        whole,
        whole,
        max_seqlen_q=max(keys),  # the farthest position's angles are needed
        max_seqlen_kv=max(keys),
        positions_T=_placed(batch.positions_T, batch.context_rank, context) if context > 1 else batch.positions_T,
        segments=PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest),
        spans=Spans(bounds, cu_keys, batch.lengths_S, keys),
        key_rows_K=batch.key_rows_K,
    )


def _placed(share_T: Tensor, rank: int, size: int) -> Tensor:
    """A rank's positions where megatron-core takes them from if the pack is one sequence: the halves of its share are the pieces
    number ``rank`` and number ``2 * size - 1 - rank``."""
    pieces = share_T.new_zeros(2 * size, len(share_T) // 2)
    pieces[rank], pieces[2 * size - 1 - rank] = share_T.chunk(2)
    return pieces.view(-1)
