"""Log-probabilities of labels straight from hidden states: vocabulary-parallel, in bounded memory, full logits never made.

    z_v = h . w_v / temperature     logp(label | h) = z_label - logsumexp_v z_v     entropy(h) = logsumexp_v z_v - sum_v p_v z_v

Rows without a label are skipped, columns that only pad the vocabulary never enter the sums. Chunks of rows bound the
workspace; the backward pass computes the logits of all chunks again but those of the last, whose probabilities are kept.

    d logp / d z_v = [v = label] - p_v     d entropy / d z_v = -p_v (log p_v + entropy)
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
    temperature: float = 1.0,
    entropy: bool = False,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of every label, and on request the entropy of the distribution it is drawn from.

    Args:
        hidden: [T, 1, H], or [T / TP, 1, H] under sequence parallelism.
        head_weight: [V_l, H], this rank's shard of the output embedding, padding rows last in the last shards.
        labels_T: [T] int64, IGNORE where nothing is asked.
        vocab_size: V without padding.
        tensor_group: the ranks that share the vocabulary.
        temperature: logits are divided by it, in float32.
        entropy: whether to give entropies. The log-probabilities are the same bits either way.
        workspace: bytes of logits made at a time.

    Returns:
        Log-probabilities and entropies (None unless asked for), each [T] float32 in nats, 0 where the label is IGNORE, the same
        on every rank of the group. Entropies may be differentiated; as long as nobody does, they cost no time backward.
    """
    if sequence_parallel:  # backward: reduce-scatter of the ranks' partial gradients
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tensor_group)
    else:  # backward: all-reduce of them
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tensor_group)
    rows = (labels_T != IGNORE).nonzero().squeeze(1)
    first = head_weight.shape[0] * tensor_group.rank()
    real = max(0, min(head_weight.shape[0], vocab_size - first))
    logp_N, entropy_N = _LabelLogProb.apply(
        hidden.squeeze(1).index_select(0, rows),
        head_weight,
        labels_T[rows] - first,
        real,
        tensor_group,
        temperature,
        entropy,
        workspace,
    )
    nothing_T = torch.zeros(labels_T.shape, dtype=torch.float32, device=hidden.device)
    return nothing_T.index_copy(0, rows, logp_N), nothing_T.index_copy(0, rows, entropy_N) if entropy else None


def _logits(hidden_NH: Tensor, weight_VrH: Tensor, temperature: float) -> Tensor:
    logits = times_transposed(hidden_NH, weight_VrH).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


class _LabelLogProb(torch.autograd.Function):
    """Forward and backward over the rows that have a label, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VlH, local_labels_N, real, group, temperature, entropy, workspace):
        ctx.set_materialize_grads(False)  # so that backward can tell what is asked of it
        weight = weight_VlH[:real]
        mine_N = (local_labels_N >= 0) & (local_labels_N < real)
        n = hidden_NH.shape[0]
        lse_N = torch.full((n,), -torch.inf, dtype=torch.float32, device=hidden_NH.device)
        target_N = torch.zeros_like(lse_N)
        mean_N = torch.zeros_like(lse_N)  # logit to be expected
        chunk = max(1, workspace // (4 * max(real, 1)))
        softmax = None
        for start in range(0, n if real else 0, chunk):
            here = slice(start, start + chunk)
            softmax = None  # the chunk's before: two at a time at most
            logits = _logits(hidden_NH[here], weight, temperature)
            inside = local_labels_N[here].clamp(0, real - 1)
            target_N[here] = torch.where(mine_N[here], logits.gather(1, inside[:, None]).squeeze(1), 0.0)
            softmax = logits.softmax(-1)  # its largest is exp(largest logit - logsumexp)
            lse_N[here] = logits.amax(-1) - softmax.amax(-1).log()
            if entropy:
                mean_N[here] = torch.linalg.vecdot(softmax, logits)
        local_lse_N = lse_N
        if group.size() > 1 and n:
            peak_N = lse_N.clone()
            dist.all_reduce(peak_N, dist.ReduceOp.MAX, group=group)
            share_N = (lse_N - peak_N).exp()
            # three rows with entropies or without: the order in which ranks are summed depends on the message's size
            sums = torch.stack([share_N, target_N, share_N * mean_N])
            dist.all_reduce(sums, group=group)
            lse_N, target_N, mean_N = peak_N + sums[0].log(), sums[1], sums[2] / sums[0]
        entropy_N = lse_N - mean_N if entropy else None
        ctx.save_for_backward(hidden_NH, weight_VlH, local_labels_N, mine_N, lse_N, local_lse_N, entropy_N)
        ctx.real, ctx.chunk, ctx.temperature, ctx.softmax = real, chunk, temperature, softmax
        return target_N - lse_N, entropy_N

    @staticmethod
    def backward(ctx, grad_N, grad_entropy_N):
        hidden_NH, weight_VlH, local_labels_N, mine_N, lse_N, local_lse_N, entropy_N = ctx.saved_tensors
        weight = weight_VlH[: ctx.real]
        grad_N = torch.zeros_like(lse_N) if grad_N is None else grad_N / ctx.temperature
        if grad_entropy_N is not None:
            grad_entropy_N = grad_entropy_N / ctx.temperature
        grad_hidden = torch.zeros_like(hidden_NH)
        n = hidden_NH.shape[0]
        # several chunks add up in float32, whatever the weights are
        single = n <= ctx.chunk
        grad_weight = torch.zeros(weight_VlH.shape, dtype=weight.dtype if single else torch.float32, device=weight.device)
        for start in range(0, n if ctx.real else 0, ctx.chunk):
            here = slice(start, start + ctx.chunk)
            h = hidden_NH[here]
            if grad_entropy_N is not None:  # wants log-probabilities beside the probabilities
                logp = _logits(h, weight, ctx.temperature).sub_(lse_N[here, None])
                d_logits = logp.exp()
                logp.add_(entropy_N[here, None]).mul_(grad_entropy_N[here, None]).add_(grad_N[here, None])
                d_logits.mul_(logp.neg_())
                del logp
            elif start + ctx.chunk < n:
                d_logits = _logits(h, weight, ctx.temperature).sub_(lse_N[here, None]).exp_()
                d_logits.mul_(-grad_N[here, None])
            else:  # this shard's share of the probabilities
                d_logits = ctx.softmax.mul_((-grad_N[here] * (local_lse_N[here] - lse_N[here]).exp())[:, None])
                ctx.softmax = None
            own = mine_N[here].nonzero().squeeze(1)
            d_logits[own, local_labels_N[here][own]] += grad_N[here][own]
            d_logits = d_logits.to(h.dtype)
            grad_hidden[here] = times_transposed(d_logits, weight.t())
            if grad_weight.dtype == h.dtype:
                grad_weight[: ctx.real].addmm_(d_logits.t(), h)
            else:
                grad_weight[: ctx.real] += d_logits.t() @ h
        return grad_hidden, grad_weight.to(weight_VlH.dtype), None, None, None, None, None, None
