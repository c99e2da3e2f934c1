"""cuDNN's attention in `compiled`, and the kernels for packed sequences that context-parallel ranks share."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "fused_attn_bwd",
    "fused_attn_fwd",
    "fused_rope_backward",
    "fused_rope_forward",
    "get_fused_attn_backend",
    "thd_grad_correction",
    "thd_out_correction",
    "thd_read_half_tensor",
    "thd_read_second_half_lse",
    "thd_second_half_lse_correction",
]


def _compiled():
    from tests.standins.transformer_engine import compiled  # which imports this file

    return compiled


def get_fused_attn_backend(is_training, q_dtype, kv_dtype, *_rest):
    kinds, found = _compiled().NVTE_Fused_Attn_Backend, _compiled().DType
    return kinds.NVTE_F16_arbitrary_seqlen if q_dtype in (found.kBFloat16, found.kFloat16) else kinds.NVTE_No_Backend


def _segments(cu, padded):
    """Where each segment begins, and how many tokens of it count."""
    begins = (cu if padded is None else padded).tolist()
    lengths = (cu[1:] - cu[:-1]).tolist()
    return list(zip(begins[:-1], lengths, strict=True))


def _scores(q, k, scale, mask, window):
    """[heads, queries, keys] in float64, left out ones at minus infinity."""
    kinds = _compiled().NVTE_Mask_Type
    assert mask in (kinds.NVTE_PADDING_MASK, kinds.NVTE_PADDING_CAUSAL_MASK)
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(groups, 1)) * scale
    queries, keys = scores.shape[1:]
    back = torch.arange(queries)[:, None] - torch.arange(keys)
    seen = back >= 0 if mask == kinds.NVTE_PADDING_CAUSAL_MASK else torch.ones_like(back, dtype=torch.bool)
    left, right = window
    if left >= 0:
        seen &= back <= left
    if right >= 0:
        seen &= back >= -right
    return scores.masked_fill(~seen, -torch.inf)


def fused_attn_fwd(
    max_seqlen_q, max_seqlen_kv, is_training, attn_scale, p_dropout, set_zero, qkv_layout, bias_type, attn_mask_type,
    softmax_type, window_size, cu_seqlens_q, cu_seqlens_kv, Q, K, V, fake_dtype, cu_seqlens_q_padded, cu_seqlens_kv_padded,
    page_table_k, page_table_v, s_quantizer, o_quantizer, Bias, SoftmaxOffset, rng_gen, rng_elts_per_thread, return_max_logit,
    cuda_graph,
):  # fmt: skip
    """[output, log-sum-exp [T, heads, 1], state of the random numbers]."""
    _plain(qkv_layout, bias_type, softmax_type, p_dropout, max_seqlen_q, cu_seqlens_q, max_seqlen_kv, cu_seqlens_kv)
    out = torch.zeros(*Q.shape[:2], V.shape[2], dtype=Q.dtype)
    lse = torch.zeros(*Q.shape[:2], 1, dtype=torch.float32)
    spans = zip(_segments(cu_seqlens_q, cu_seqlens_q_padded), _segments(cu_seqlens_kv, cu_seqlens_kv_padded), strict=True)
    for (q, rows), (k, keys) in spans:
        if not rows or not keys:
            continue
        scores = _scores(Q[q : q + rows], K[k : k + keys], attn_scale, attn_mask_type, window_size)
        values = V[k : k + keys].double().repeat_interleave(Q.shape[1] // V.shape[1], 1)
        total = scores.logsumexp(-1)
        weights = (scores - total[..., None]).exp()
        out[q : q + rows] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
        lse[q : q + rows] = total.t()[..., None].float()
    return [out, lse, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q, max_seqlen_kv, attn_scale, p_dropout, set_zero, qkv_layout, bias_type, attn_mask_type, softmax_type,
    window_size, deterministic, cu_seqlens_q, cu_seqlens_kv, Q, K, V, out, dO, fake_dtype, dqkv_type, Aux_CTX_Tensors,
    cu_seqlens_q_padded, cu_seqlens_kv_padded, s_quantizer, dp_quantizer, dqkv_quantizer, cuda_graph,
):  # fmt: skip
    """[gradients of queries, keys, values, none of a bias and of an offset]. The log-sum-exp may be one over more keys than are
    here."""
    _plain(qkv_layout, bias_type, softmax_type, p_dropout, max_seqlen_q, cu_seqlens_q, max_seqlen_kv, cu_seqlens_kv)
    lse = Aux_CTX_Tensors[0]
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64) for x in (Q, K, V))
    groups = Q.shape[1] // K.shape[1]
    spans = zip(_segments(cu_seqlens_q, cu_seqlens_q_padded), _segments(cu_seqlens_kv, cu_seqlens_kv_padded), strict=True)
    for (q, rows), (k, keys) in spans:
        if not rows or not keys:
            continue
        query, key, value = (x.double() for x in (Q[q : q + rows], K[k : k + keys], V[k : k + keys]))
        given, up = out[q : q + rows].double(), dO[q : q + rows].double()
        scores = _scores(query, key, attn_scale, attn_mask_type, window_size)
        weights = (scores - lse[q : q + rows, :, 0].t()[..., None].double()).exp()
        wide = value.repeat_interleave(groups, 1)
        dv[k : k + keys] += torch.einsum("hqk,qhd->khd", weights, up).unflatten(1, (-1, groups)).sum(2)
        inner = torch.einsum("qhd,khd->hqk", up, wide) - (up * given).sum(-1).t()[..., None]
        ds = weights * inner * attn_scale
        dq[q : q + rows] += torch.einsum("hqk,khd->qhd", ds, key.repeat_interleave(groups, 1))
        dk[k : k + keys] += torch.einsum("hqk,qhd->khd", ds, query).unflatten(1, (-1, groups)).sum(2)
    return [*(x.to(Q.dtype) for x in (dq, dk, dv)), None, None]


def _plain(layout, bias, softmax, dropout, longest_q, cu_q, longest_k, cu_k) -> None:
    """What a pack's attention has to be here."""
    compiled = _compiled()
    assert layout == compiled.NVTE_QKV_Layout.NVTE_THD_THD_THD and bias == compiled.NVTE_Bias_Type.NVTE_NO_BIAS
    assert softmax == compiled.NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX and not dropout
    for longest, cu in ((longest_q, cu_q), (longest_k, cu_k)):
        assert cu.dtype == torch.int32 and longest >= int(cu.diff().max())


def _halves(cu_seqlens, half: int):
    """Rows of the first or second half of each segment."""
    assert cu_seqlens.dtype == torch.int32
    rows = []
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        assert (end - begin) % 2 == 0
        middle = (begin + end) // 2
        rows.append(torch.arange(begin, middle) if half == 0 else torch.arange(middle, end))
    return torch.cat(rows)


def thd_read_half_tensor(tensor, cu_seqlens, half_idx):
    assert tensor.shape[-1] * tensor.shape[-2] * tensor.element_size() % 16 == 0
    return tensor.index_select(tensor.dim() - 3, _halves(cu_seqlens, half_idx))


def thd_second_half_lse_correction(lse, lse_per_step, cu_seqlens, lse_packed):
    assert lse_packed
    rows = _halves(cu_seqlens, 1)
    lse[:, rows] = torch.logaddexp(lse[:, rows], lse_per_step[:, : len(rows)])


def thd_read_second_half_lse(lse, cu_seqlens, lse_packed, second_half_lse_seqlen):
    assert lse_packed
    rows = _halves(cu_seqlens, 1)
    half = lse.new_zeros(lse.shape[0], second_half_lse_seqlen)
    half[:, : len(rows)] = lse[:, rows]
    return half


def thd_out_correction(out, out_per_step, lse, lse_per_step, cu_seqlens, only_second_half, lse_packed):
    assert lse_packed
    rows = _halves(cu_seqlens, 1) if only_second_half else torch.arange(int(cu_seqlens[-1]))
    share = (lse_per_step[:, : len(rows)] - lse[:, rows]).exp().t()[..., None]
    out[rows] += (out_per_step[: len(rows)] * share).to(out.dtype)


def thd_grad_correction(grad, grad_per_step, cu_seqlens, first_half, second_half):
    """Each half of ``grad`` is left alone, overwritten or added to. Where one is left alone, ``grad_per_step`` has
    the other's rows only."""
    what = (first_half, second_half)
    for half, how in enumerate(what):
        if how == "none":
            continue
        rows = _halves(cu_seqlens, half)
        given = grad_per_step[: len(rows)] if "none" in what else grad_per_step[rows]
        grad[rows] = given if how == "copy" else grad[rows] + given


def fused_rope_forward(input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    """Rotated queries or keys of packed segments, of which a context-parallel rank holds the pieces cp_rank and 2 cp_size - 1 -
    cp_rank of each; their positions begin anew in every segment."""
    angles = _angles(input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank)
    return (input.float() * angles.cos() + _turned(input.float()) * angles.sin()).to(input.dtype)


def fused_rope_backward(output_grads, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    angles = _angles(output_grads, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank)
    up = output_grads.float()
    return (up * angles.cos() - _turned(up * angles.sin())).to(output_grads.dtype)


def _turned(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _angles(x, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    """[T, 1, head_dim]"""
    assert qkv_format == _compiled().NVTE_QKV_Format.NVTE_THD and not interleaved and start_positions is None
    assert freqs.dtype == torch.float32 and freqs.shape[1] == freqs.shape[2] == 1 and freqs.shape[3] == x.shape[2]
    if isinstance(x, FakeTensor):  # shapes alone, and nothing is read, as by the kernel
        return freqs.view(freqs.shape[0], 1, -1)[:1].expand(len(x), 1, -1)
    positions = []
    for length in (cu_seqlens[1:] - cu_seqlens[:-1]).tolist():
        own = length // cp_size
        if cp_size == 1:
            positions.append(torch.arange(own))
        else:
            half = own // 2
            first = torch.arange(half) + cp_rank * half
            positions += [first, torch.arange(half) + length - (cp_rank + 1) * half]
    at = torch.cat(positions)
    assert len(at) == len(x)
    return freqs.view(freqs.shape[0], 1, -1)[at]
