"""Row work as Triton kernels: one program a row, logits in the precision the matrix product gave them, arithmetic in float32.

Rows of the workspace begin at multiples of 16 bytes and are read LANES x 8 columns at a time, eight to a thread: a largest and
a sum over them cost no exchange between threads, and one exponential an element is left. Same interface as `reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tulu_kernels.linear_logprob.combine import LOWEST, Row

BYTES = 2
"""of a logit in the workspace, bf16; float32 training takes twice the workspace"""
_LANES, _WARPS = 512, 8
_ALIGN = 8


def product(hidden_NH: Tensor, weight_VrH: Tensor, space: Tensor | None) -> Tensor:
    """Logits [N, V_r] whose rows are a multiple of 8 apart, in the first rows of `space` where there is one."""
    rows, columns = len(hidden_NH), len(weight_VrH)
    if space is None:
        stride = -(-columns // _ALIGN) * _ALIGN
        space = hidden_NH.new_empty(rows, stride)[:, :columns]
    return torch.mm(hidden_NH, weight_VrH.t(), out=space[:rows])


def statistics(logits_NV: Tensor, labels_N: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """See `reference.statistics`; the logits stay as they are and are what is kept."""
    rows, columns = logits_NV.shape
    if logits_NV.stride(0) % _ALIGN:
        raise ValueError(f"rows of logits are {logits_NV.stride(0)} apart, expected a multiple of {_ALIGN}: use product()")
    stats_N4 = torch.empty(rows, 4, dtype=torch.float32, device=logits_NV.device)
    _statistics[(rows,)](
        logits_NV, labels_N, stats_N4, logits_NV.stride(0) // _ALIGN, columns, temperature, LOWEST,
        MOMENT=entropy, LANES=_LANES, num_warps=_WARPS,
    )  # fmt: skip
    return stats_N4, logits_NV


def again(logits_NV: Tensor, temperature: float) -> Tensor:
    """See `reference.again`."""
    return logits_NV


def gradient(
    kept_NV: Tensor,
    labels_N: Tensor,
    mass_N: Tensor,
    upstream_N: Tensor,
    upstream_entropy_N: Tensor | None,
    row: Row,
    temperature: float,
) -> Tensor:
    """See `reference.gradient`; in the logits' precision."""
    rows, columns = kept_NV.shape
    asked = upstream_entropy_N is not None
    _gradient[(rows,)](
        kept_NV, labels_N, row.peak_N, row.log_total_N, row.entropy_N, upstream_N, upstream_entropy_N if asked else upstream_N,
        kept_NV.stride(0) // _ALIGN, columns, temperature, ENTROPY=asked, LANES=_LANES, num_warps=_WARPS,
    )  # fmt: skip
    return kept_NV


@triton.jit
def _statistics(
    logits, labels, stats, stride_8, columns, temperature, LOWEST: tl.constexpr, MOMENT: tl.constexpr, LANES: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * (stride_8 * 8)
    lane = tl.arange(0, LANES)
    at = lane[:, None] * 8 + tl.arange(0, 8)[None, :]
    # each lane's own peak, and sums relative to it; a peak starts below everything, not at 0
    peak = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    whole = columns // (LANES * 8) * (LANES * 8)
    for start in range(0, whole, LANES * 8):
        z = tl.load(line + start + at).to(tl.float32) / temperature
        peak, total, moment = _added(z, tl.max(z, 1), peak, total, moment, MOMENT)
    if whole < columns:
        alive = whole + lane * 8 < columns
        z = tl.load(line + whole + at, mask=alive[:, None], other=0.0).to(tl.float32) / temperature  # up to the stride
        z = tl.where(whole + at < columns, z, LOWEST)
        before_peak, before_total, before_moment = peak, total, moment
        peak, total, moment = _added(z, tl.max(z, 1), peak, total, moment, MOMENT)
        peak = tl.where(alive, peak, before_peak)
        total = tl.where(alive, total, before_total)
        moment = tl.where(alive, moment, before_moment)
    highest = tl.max(peak, 0)
    share = tl.exp(peak - highest)
    tl.store(stats + row * 4, highest)
    tl.store(stats + row * 4 + 1, tl.sum(share * total, 0))
    label = tl.load(labels + row)
    mine = (label >= 0) & (label < columns)
    target = tl.load(line + label, mask=mine, other=0.0).to(tl.float32) / temperature
    tl.store(stats + row * 4 + 2, target)
    if MOMENT:
        moment = share * (moment + (peak - highest) * total)
    tl.store(stats + row * 4 + 3, tl.sum(moment, 0))


@triton.jit
def _added(z, largest, peak, total, moment, MOMENT: tl.constexpr):
    """Sums of eight more columns a lane, relative to the higher peak."""
    higher = tl.maximum(peak, largest)
    below = peak - higher
    scale = tl.exp(below)
    difference = z - higher[:, None]
    share = tl.exp(difference)
    if MOMENT:
        # share is 0 long before the difference could make it nan
        moment = scale * (moment + below * total) + tl.sum(share * difference, 1)
    return higher, scale * total + tl.sum(share, 1), moment


@triton.jit
def _gradient(
    logits, labels, peaks, log_totals, entropies, upstream, upstream_entropy, stride_8, columns, temperature,
    ENTROPY: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * (stride_8 * 8)
    at = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    label = tl.load(labels + row)
    peak = tl.load(peaks + row)
    log_total = tl.load(log_totals + row)
    g = tl.load(upstream + row) / temperature
    entropy = 0.0
    g_entropy = 0.0
    if ENTROPY:
        entropy = tl.load(entropies + row)
        g_entropy = tl.load(upstream_entropy + row) / temperature
    whole = columns // (LANES * 8) * (LANES * 8)
    for start in range(0, whole, LANES * 8):
        z = tl.load(line + start + at)
        d = _d_logits(z, start + at, label, temperature, peak, log_total, g, entropy, g_entropy, ENTROPY)
        tl.store(line + start + at, d.to(z.dtype))
    if whole < columns:
        inside = whole + tl.arange(0, LANES)[:, None] * 8 + tl.zeros([1, 8], tl.int32) < columns  # up to the stride
        z = tl.load(line + whole + at, mask=inside, other=0.0)
        d = _d_logits(z, whole + at, label, temperature, peak, log_total, g, entropy, g_entropy, ENTROPY)
        tl.store(line + whole + at, d.to(z.dtype), mask=inside)


@triton.jit
def _d_logits(z, column, label, temperature, peak, log_total, g, entropy, g_entropy, ENTROPY: tl.constexpr):
    logp = z.to(tl.float32) / temperature - peak - log_total
    factor = g
    if ENTROPY:
        factor = g + g_entropy * (logp + entropy)
    return tl.where(column == label, g, 0.0) - tl.exp(logp) * factor
