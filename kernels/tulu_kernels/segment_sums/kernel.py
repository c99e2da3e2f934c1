"""Segment sums as a Triton kernel: one program a segment."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 2048, 8


def sums(values_T: Tensor, minus_T: Tensor | None, segments_T: Tensor, segments: int) -> Tensor:
    """See `tulu_kernels.segment_sums.segment_sums`; not differentiable."""
    first_S1 = torch.searchsorted(segments_T, torch.arange(segments + 1, device=segments_T.device))
    sums_S = torch.empty(segments, dtype=torch.float64, device=values_T.device)
    values_T = values_T.contiguous()
    minus_T = None if minus_T is None else minus_T.contiguous()
    _sums[(segments,)](
        values_T, values_T if minus_T is None else minus_T, first_S1, sums_S, len(values_T),
        MINUS=minus_T is not None, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return sums_S


@triton.jit
def _sums(values, minus, first, sums, count, MINUS: tl.constexpr, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    begin = tl.load(first + segment)
    end = tl.load(first + segment + 1)
    total = tl.zeros([BLOCK], tl.float64)
    # whole vectors are read, from the one that the segment begins in
    for start in range(begin // 8 * 8, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if start + BLOCK <= count:
            value = tl.load(values + at).to(tl.float64)
            if MINUS:
                value -= tl.load(minus + at).to(tl.float64)
        else:
            value = tl.load(values + at, mask=at < count, other=0.0).to(tl.float64)
            if MINUS:
                value -= tl.load(minus + at, mask=at < count, other=0.0).to(tl.float64)
        total += tl.where((at >= begin) & (at < end), value, 0.0)
    tl.store(sums + segment, tl.sum(total, 0))
