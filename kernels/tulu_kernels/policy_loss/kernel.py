"""A policy loss as a Triton kernel: one pass over the tokens gives loss, metrics and gradient.

Programs leave partial sums, which torch adds in one order: no atomics, the same bits every time. All is computed in float64, the
bounds included, which is why they are compiled in: a number that is passed would come as float32. Same interface as `reference`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tulu_kernels.policy_loss.terms import LARGEST, SUMS, Outcome, PolicyLoss, Tokens
from tulu_kernels.segment_sums.kernel import sums

_BLOCK, _WARPS = 512, 4
_COLUMNS = tl.constexpr(len(SUMS) + len(LARGEST))


def losses(how: PolicyLoss, tokens: Tokens, log_ratio_S: Tensor | None, log_weight_S: Tensor | None) -> Outcome:
    """See `reference.losses`."""
    entropy_T = tokens.entropy_T if how.entropy else tokens.entropy_T.detach()  # so that nobody computes a gradient of 0
    loss_sum, totals, largest = _Losses.apply(tokens.logp_T, entropy_T, log_ratio_S, how, tokens, log_weight_S)
    named = {name: total for name, total in zip(SUMS, totals.unbind(), strict=True) if name != "kl" or how.beta}
    return Outcome(loss_sum, named, dict(zip(LARGEST, largest.unbind(), strict=True)))


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp_T, entropy_T, log_ratio_S, how: PolicyLoss, tokens: Tokens, log_weight_S):
        blocks = max(1, triton.cdiv(len(logp_T), _BLOCK))
        partials = logp_T.new_empty(blocks, len(SUMS) + len(LARGEST), dtype=torch.float64)
        wanted = any(ctx.needs_input_grad)
        d_logp_T = torch.empty_like(logp_T) if wanted else None
        d_entropy_T = torch.empty_like(entropy_T) if wanted and how.entropy else None
        d_log_ratio_T = torch.empty_like(logp_T, dtype=torch.float64) if wanted and log_ratio_S is not None else None
        inverse_S = tokens.trained_S.clamp(min=1).double().reciprocal()  # cheaper than a division a token
        given = (
            logp_T, tokens.old_logp_T, tokens.sampler_logp_T, tokens.ref_logp_T if how.beta else None, tokens.advantages_T,
            entropy_T, tokens.trained_T.view(torch.uint8), tokens.segments_T, inverse_S, log_ratio_S, log_weight_S,
        )  # fmt: skip
        made = d_logp_T, d_entropy_T, d_log_ratio_T, partials
        # what is not there is not looked at
        arrays = [logp_T if array is None else array.contiguous() for array in given] + [logp_T if a is None else a for a in made]
        constants = constants_of(how, old=tokens.old_logp_T is not None, gradient=wanted)
        _pass[(blocks,)](*arrays, len(logp_T), **constants, BLOCK=_BLOCK, num_warps=_WARPS)
        d_log_ratio_S = None
        if d_log_ratio_T is not None:
            d_log_ratio_S = sums(d_log_ratio_T, None, tokens.segments_T, len(log_ratio_S))
        ctx.save_for_backward(d_logp_T, d_entropy_T, d_log_ratio_S)
        totals, largest = partials[:, : len(SUMS)].sum(0), partials[:, len(SUMS) :].amax(0)
        ctx.mark_non_differentiable(totals, largest)
        return totals[0].clone(), totals, largest

    @staticmethod
    def backward(ctx, upstream, _totals, _largest):
        return *(None if d is None else upstream * d for d in ctx.saved_tensors), None, None, None


def constants_of(how: PolicyLoss, old: bool, gradient: bool) -> dict[str, object]:
    """What is compiled into the kernel.

    Args:
        old: whether there are old log-probabilities.
        gradient: whether the gradient is wanted.
    """
    return dict(
        LOSS=how.loss,
        LOW=1 - how.clip_low,
        HIGH=1 + how.clip_high,
        MEAN=how.aggregation,
        PART=1 / how.max_tokens,
        BETA=float(how.beta),
        KL=how.kl,
        ENTROPY=float(how.entropy),
        IMPORTANCE=how.importance,
        LOG_CAP=math.log(how.importance_cap),
        LOG_BOUND=math.inf if how.mask_above is None else math.log(how.mask_above),
        OLD=old,
        GRADIENT=gradient,
    )


@triton.jit
def _pass(
    logp, old, sampler, ref, advantages, entropy, trained, segments, inverses, log_ratios, log_weights,
    d_logp, d_entropy, d_log_ratio, partials, count,
    LOSS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, MEAN: tl.constexpr, PART: tl.constexpr, BETA: tl.constexpr,
    KL: tl.constexpr, ENTROPY: tl.constexpr, IMPORTANCE: tl.constexpr, LOG_CAP: tl.constexpr, LOG_BOUND: tl.constexpr,
    OLD: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK
    if start + BLOCK <= count:  # without masks vectors stay whole
        _block(
            start, count, logp, old, sampler, ref, advantages, entropy, trained, segments, inverses, log_ratios, log_weights,
            d_logp, d_entropy, d_log_ratio, partials, LOSS, LOW, HIGH, MEAN, PART, BETA, KL, ENTROPY, IMPORTANCE, LOG_CAP,
            LOG_BOUND, OLD, GRADIENT, BLOCK, False,
        )  # fmt: skip
    else:
        _block(
            start, count, logp, old, sampler, ref, advantages, entropy, trained, segments, inverses, log_ratios, log_weights,
            d_logp, d_entropy, d_log_ratio, partials, LOSS, LOW, HIGH, MEAN, PART, BETA, KL, ENTROPY, IMPORTANCE, LOG_CAP,
            LOG_BOUND, OLD, GRADIENT, BLOCK, True,
        )  # fmt: skip


@triton.jit
def _block(
    start, count, logp, old, sampler, ref, advantages, entropy, trained, segments, inverses, log_ratios, log_weights,
    d_logp, d_entropy, d_log_ratio, partials,
    LOSS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, MEAN: tl.constexpr, PART: tl.constexpr, BETA: tl.constexpr,
    KL: tl.constexpr, ENTROPY: tl.constexpr, IMPORTANCE: tl.constexpr, LOG_CAP: tl.constexpr, LOG_BOUND: tl.constexpr,
    OLD: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    at = start + tl.arange(0, BLOCK)
    counted = _read(trained, at, count, LAST) != 0
    x = _read(logp, at, count, LAST).to(tl.float64)
    before = x
    if OLD:
        before = _read(old, at, count, LAST).to(tl.float64)
    advantage = _read(advantages, at, count, LAST).to(tl.float64)
    spread = _read(entropy, at, count, LAST).to(tl.float64)
    apart = before - _read(sampler, at, count, LAST).to(tl.float64)
    segment = at
    inverse = tl.full([BLOCK], 1.0, tl.float64)
    if LOSS == "gspo" or MEAN == "sequence" or IMPORTANCE == "sequence":
        segment = _read(segments, at, count, LAST)  # 0 beyond the end
    if LOSS == "gspo" or MEAN == "sequence":
        inverse = tl.load(inverses + segment)

    log_weight = apart
    if IMPORTANCE == "sequence":
        log_weight = tl.load(log_weights + segment)
    weight = tl.full([BLOCK], 1.0, tl.float64)
    cut = tl.zeros([BLOCK], tl.int32) != 0
    if IMPORTANCE != "none":
        cap = tl.full([BLOCK], LOG_CAP, tl.float64)
        cut = log_weight > cap
        weight = tl.exp(tl.minimum(log_weight, cap))
    left_out = tl.abs(log_weight) > tl.full([BLOCK], LOG_BOUND, tl.float64)
    weight = tl.where(left_out, 0.0, weight)

    log_ratio = x - before
    if LOSS == "gspo":
        log_ratio = tl.load(log_ratios + segment) * inverse
    ratio = tl.exp(log_ratio)
    lowest = tl.full([BLOCK], LOW, tl.float64)
    highest = tl.full([BLOCK], HIGH, tl.float64)
    low = ratio < lowest
    high = ratio > highest
    clipped = tl.minimum(tl.maximum(ratio, lowest), highest) * advantage
    if LOSS == "cispo":
        loss = -clipped * x * weight
        d_x = -clipped * weight
        d_ratio = tl.zeros([BLOCK], tl.float64)
    else:
        low = low & (advantage < 0)
        high = high & (advantage > 0)
        loss = -tl.where(low | high, clipped, ratio * advantage) * weight
        d_ratio = -tl.where(low | high, 0.0, ratio * advantage) * weight
        d_x = d_ratio
        if LOSS == "gspo":
            d_x = tl.zeros([BLOCK], tl.float64)
    divergence = tl.zeros([BLOCK], tl.float64)
    if BETA != 0:
        beta = tl.full([BLOCK], BETA, tl.float64)
        difference = x - _read(ref, at, count, LAST).to(tl.float64)
        if KL == "k1":
            divergence = difference
            d_x += beta
        elif KL == "k2":
            divergence = difference * difference / 2
            d_x += beta * difference
        else:
            other = tl.exp(-difference)
            divergence = other - 1 + difference
            d_x += beta * (1 - other)
        loss += beta * divergence
    bonus = tl.full([BLOCK], ENTROPY, tl.float64)
    if ENTROPY != 0:
        loss -= bonus * spread
    share = tl.full([BLOCK], PART if MEAN == "constant" else 1.0, tl.float64)
    if MEAN == "sequence":
        share = inverse
    share = tl.where(counted, share, 0.0)

    if GRADIENT:
        _write(d_logp, at, tl.where(counted, d_x * share, 0.0), count, LAST)
        if ENTROPY != 0:
            _write(d_entropy, at, -bonus * share, count, LAST)
        if LOSS == "gspo":
            _write(d_log_ratio, at, tl.where(counted, d_ratio * share * inverse, 0.0), count, LAST)
    one = tl.where(counted, 1.0, 0.0)
    line = partials + tl.program_id(0) * _COLUMNS  # as `SUMS` and `LARGEST` name them
    tl.store(line, tl.sum(tl.where(counted, loss * share, 0.0), 0))
    tl.store(line + 1, tl.sum(tl.where(counted, ratio, 0.0), 0))
    tl.store(line + 2, tl.sum(tl.where(low, one, 0.0), 0))
    tl.store(line + 3, tl.sum(tl.where(high, one, 0.0), 0))
    tl.store(line + 4, tl.sum(tl.where(counted, spread, 0.0), 0))
    tl.store(line + 5, tl.sum(tl.where(counted, tl.abs(apart), 0.0), 0))
    tl.store(line + 6, tl.sum(tl.where(counted, weight, 0.0), 0))
    tl.store(line + 7, tl.sum(tl.where(cut, one, 0.0), 0))
    tl.store(line + 8, tl.sum(tl.where(left_out, one, 0.0), 0))
    tl.store(line + 9, tl.sum(tl.where(counted, divergence, 0.0), 0))
    tl.store(line + 10, tl.sum(one, 0))
    tl.store(line + 11, tl.max(tl.where(counted, ratio, 0.0), 0))
    tl.store(line + 12, tl.max(tl.where(counted, tl.abs(apart), 0.0), 0))


@triton.jit
def _read(array, at, count, LAST: tl.constexpr):
    if LAST:
        value = tl.load(array + at, mask=at < count, other=0)
    else:
        value = tl.load(array + at)
    return value


@triton.jit
def _write(array, at, value, count, LAST: tl.constexpr):
    if LAST:
        tl.store(array + at, value.to(array.dtype.element_ty), mask=at < count)
    else:
        tl.store(array + at, value.to(array.dtype.element_ty))
