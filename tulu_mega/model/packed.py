"""A packed micro-batch's boundaries as megatron-core and our attention want them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from tulu_mega.model.varlen import Spans
from tulu_mega.records import PackedBatch


@dataclass
class SharedSeqParams(PackedSeqParams):
    """Of a pack whose sequences share prefixes. megatron-core takes it for one sequence, since the rotary embedding gets each
    token's own position."""

    positions_T: Tensor | None = None
    """int64"""
    spans: Spans | None = None
    """the segments, and the keys of each"""
    key_rows_K: Tensor | None = None
    """int64, the rows of the pack that are these keys, end to end"""


def packed_seq_params(batch: PackedBatch) -> PackedSeqParams:
    """What goes with a micro-batch through all layers. Nobody waits for the device."""
    bounds, longest = batch.cu_seqlens_S1, batch.max_seqlen
    if batch.key_rows_K is None:
        return PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    whole = torch.tensor([0, len(batch.tokens_T)], dtype=torch.int32, device=bounds.device)
    return SharedSeqParams(
        "thd",
        whole,
        whole,
        max_seqlen_q=batch.max_keys,  # the farthest position's angles are needed
        max_seqlen_kv=batch.max_keys,
        positions_T=batch.positions_T,
        spans=Spans(bounds, batch.cu_keys_S1, longest, batch.max_keys),
        key_rows_K=batch.key_rows_K,
    )
