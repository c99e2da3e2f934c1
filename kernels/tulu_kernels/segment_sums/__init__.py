"""Sums over each sequence of a pack, in float64; on a GPU one program a sequence, without atomics: the same bits every time."""

from __future__ import annotations

import torch
from torch import Tensor

from tulu_kernels.dispatch import Backend, chosen

__all__ = ["segment_sums"]


def segment_sums(
    values_T: Tensor, segments_T: Tensor, segments: int, *, minus_T: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Sums of each segment's values, or of their differences from others, which are taken in float64.

    Args:
        values_T: [T] of any float type.
        segments_T: [T] int64, ascending: which of the segments a token is in. A segment may have no tokens.
        segments: their number.
        minus_T: [T], constants.
        backend: see `dispatch.chosen`.

    Returns:
        float64 [segments], differentiable in ``values_T``.
    """
    if chosen("segment_sums", values_T.device, backend) == "triton":
        return _SegmentSums.apply(values_T, minus_T, segments_T, segments)
    wide_T = values_T.double() if minus_T is None else values_T.double() - minus_T.detach().double()
    return wide_T.new_zeros(segments).index_add(0, segments_T, wide_T)


class _SegmentSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values_T, minus_T, segments_T, segments):
        from tulu_kernels.segment_sums.kernel import sums

        ctx.save_for_backward(segments_T)
        ctx.dtype = values_T.dtype
        return sums(values_T, minus_T, segments_T, segments)

    @staticmethod
    def backward(ctx, upstream_S):
        (segments_T,) = ctx.saved_tensors
        return upstream_S.index_select(0, segments_T).to(ctx.dtype), None, None, None
