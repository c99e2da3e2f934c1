"""A packed micro-batch's boundaries as megatron-core and our attention want them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from tulu_mega.model.varlen import Spans
from tulu_mega.records import PackedBatch


@dataclass
class PlacedSeqParams(PackedSeqParams):
    """Of a pack that a rank has all of, for our own attention. megatron-core takes it for one sequence, whose boundaries are on
    the host, and the rotary embedding gets each token's own position: otherwise it would ask the device in each layer where
    segments begin, and could not know that one goes on after a shared prefix."""

    positions_T: Tensor | None = None
    """int64"""
    spans: Spans | None = None
    """the segments, and the keys of each"""
    key_rows_K: Tensor | None = None
    """int64, the rows of the pack that are these keys, end to end; None where each segment's keys are its own"""


def packed_seq_params(batch: PackedBatch, placed: bool) -> PackedSeqParams:
    """What goes with a micro-batch through all layers. Nobody waits for the device.

    Args:
        placed: whether this rank has all of the pack and attention is our own.
    """
    bounds, longest = batch.cu_seqlens_S1, batch.max_seqlen
    if not placed:
        return PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    whole = torch.tensor([0, len(batch.tokens_T)], dtype=torch.int32)
    shared = batch.key_rows_K is not None
    cu_keys, most_keys = (batch.cu_keys_S1, batch.max_keys) if shared else (bounds, longest)
    return PlacedSeqParams(
        "thd",
        whole,
        whole,
        max_seqlen_q=most_keys,  # the farthest position's angles are needed
        max_seqlen_kv=most_keys,
        positions_T=batch.positions_T,
        spans=Spans(bounds, cu_keys, longest, most_keys),
        key_rows_K=batch.key_rows_K,
    )
