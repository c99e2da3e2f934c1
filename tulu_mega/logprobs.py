"""Log-probabilities of labels straight from hidden states: vocabulary-parallel, in bounded memory, full logits never made.

    logp(label | h) = h . w_label - logsumexp_v(h . w_v)

Rows without a label are skipped, columns that only pad the vocabulary never enter the sum. Chunks of rows bound the
workspace; the backward pass computes the logits of all chunks again but those of the last, whose probabilities are kept.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from tulu_mega.platforms.matmul import times_transposed
from tulu_mega.records import IGNORE

WORKSPACE = 64 * 2**20
"""Bytes of float32 logits a chunk may take."""


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    labels_T: Tensor,
    *,
    vocab_size: int,
    tensor_group: ProcessGroup,
    sequence_parallel: bool,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Log-probability of every label.

    Args:
        hidden: [T, 1, H], or [T / TP, 1, H] under sequence parallelism.
        head_weight: [V_l, H], this rank's shard of the output embedding, padding rows last in the last shards.
        labels_T: [T] int64, IGNORE where nothing is asked.
        vocab_size: V without padding.
        tensor_group: the ranks that share the vocabulary.
        workspace: bytes of logits made at a time.

    Returns:
        [T] float32 natural logarithms, 0 where the label is IGNORE; the same on every rank of the group.
    """
    if sequence_parallel:  # backward: reduce-scatter of the ranks' partial gradients
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tensor_group)
    else:  # backward: all-reduce of them
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tensor_group)
    rows = (labels_T != IGNORE).nonzero().squeeze(1)
    logp = torch.zeros(labels_T.shape, dtype=torch.float32, device=hidden.device)
    first = head_weight.shape[0] * tensor_group.rank()
    real = max(0, min(head_weight.shape[0], vocab_size - first))
    found = _LabelLogProb.apply(
        hidden.squeeze(1).index_select(0, rows), head_weight, labels_T[rows] - first, real, tensor_group, workspace
    )
    return logp.index_copy(0, rows, found)


class _LabelLogProb(torch.autograd.Function):
    """Forward and backward over the rows that have a label, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VlH, local_labels_N, real, group, workspace):
        weight = weight_VlH[:real]
        mine_N = (local_labels_N >= 0) & (local_labels_N < real)
        n = hidden_NH.shape[0]
        lse_N = torch.full((n,), -torch.inf, dtype=torch.float32, device=hidden_NH.device)
        target_N = torch.zeros_like(lse_N)
        chunk = max(1, workspace // (4 * max(real, 1)))
        local_lse_N, softmax = lse_N, None
        for start in range(0, n if real else 0, chunk):
            here = slice(start, start + chunk)
            logits = times_transposed(hidden_NH[here], weight).float()
            inside = local_labels_N[here].clamp(0, real - 1)
            target_N[here] = torch.where(mine_N[here], logits.gather(1, inside[:, None]).squeeze(1), 0.0)
            if start + chunk < n:
                lse_N[here] = logits.logsumexp(-1)
            else:
                softmax = logits.softmax(-1)  # its largest is exp(largest logit - logsumexp)
                lse_N[here] = logits.amax(-1) - softmax.amax(-1).log()
        if group.size() > 1 and n:
            local_lse_N = lse_N
            peak_N = lse_N.clone()
            dist.all_reduce(peak_N, dist.ReduceOp.MAX, group=group)
            both = torch.stack([(lse_N - peak_N).exp(), target_N])
            dist.all_reduce(both, group=group)
            lse_N, target_N = peak_N + both[0].log(), both[1]
        ctx.save_for_backward(hidden_NH, weight_VlH, local_labels_N, mine_N, lse_N, local_lse_N)
        ctx.real, ctx.chunk, ctx.softmax = real, chunk, softmax
        return target_N - lse_N

    @staticmethod
    def backward(ctx, grad_N):
        hidden_NH, weight_VlH, local_labels_N, mine_N, lse_N, local_lse_N = ctx.saved_tensors
        weight = weight_VlH[: ctx.real]
        grad_hidden = torch.zeros_like(hidden_NH)
        n = hidden_NH.shape[0]
        # several chunks add up in float32, whatever the weights are
        single = n <= ctx.chunk
        grad_weight = torch.zeros(weight_VlH.shape, dtype=weight.dtype if single else torch.float32, device=weight.device)
        for start in range(0, n if ctx.real else 0, ctx.chunk):
            here = slice(start, start + ctx.chunk)
            h = hidden_NH[here]
            if start + ctx.chunk < n:
                d_logits = times_transposed(h, weight).float().sub_(lse_N[here, None]).exp_()
                scale = -grad_N[here]
            else:  # this shard's share of the probabilities
                d_logits = ctx.softmax
                scale = -grad_N[here] * (local_lse_N[here] - lse_N[here]).exp()
                ctx.softmax = None
            d_logits.mul_(scale[:, None])
            own = mine_N[here].nonzero().squeeze(1)
            d_logits[own, local_labels_N[here][own]] += grad_N[here][own]
            d_logits = d_logits.to(h.dtype)
            grad_hidden[here] = times_transposed(d_logits, weight.t())
            if grad_weight.dtype == h.dtype:
                grad_weight[: ctx.real].addmm_(d_logits.t(), h)
            else:
                grad_weight[: ctx.real] += d_logits.t() @ h
        return grad_hidden, grad_weight.to(weight_VlH.dtype), None, None, None, None
