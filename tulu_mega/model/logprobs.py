"""The log-prob seam: hidden states and labels under any layout, to log-probabilities and entropies.

    z_v = h . w_v / temperature     logp(label | h) = z_label - logsumexp_v z_v     entropy(h) = logsumexp_v z_v - sum_v p_v z_v

Rows without a label are skipped, columns that only pad the vocabulary never enter the sums, full logits are never made: see
`tulu_kernels.linear_logprob`, which does the work. Here are the collectives of the layout.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup
from tulu_kernels.dispatch import Backend
from tulu_kernels.linear_logprob import WORKSPACE, linear_logprob

from tulu_mega.platforms.cpu_speed.matmul import times_transposed
from tulu_mega.process import plain
from tulu_mega.records import IGNORE


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    labels_T: Tensor,
    *,
    labelled_N: Tensor | None = None,
    vocab_size: int,
    tensor_group: ProcessGroup,
    sequence_parallel: bool,
    temperature: float = 1.0,
    entropy: bool = False,
    workspace: int = WORKSPACE,
    kernels: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of every label, and on request the entropy of the distribution it is drawn from.

    Args:
        hidden: [T, 1, H], or [T / TP, 1, H] under sequence parallelism.
        head_weight: [V_l, H], this rank's shard of the output embedding, padding rows last in the last shards.
        labels_T: [T] int64, IGNORE where nothing is asked.
        labelled_N: int64, ascending, where it is not; where unset it is looked for, for which the host waits for a GPU.
        vocab_size: V without padding.
        tensor_group: the ranks that share the vocabulary.
        temperature: logits are divided by it, in float32.
        entropy: whether to give entropies. The log-probabilities are the same bits either way.
        workspace: bytes of logits made at a time.
        kernels: Triton kernels or torch, see `tulu_kernels.dispatch`.

    Returns:
        Log-probabilities and entropies (None unless asked for), each [T] float32 in nats, 0 where the label is IGNORE, the same
        on every rank of the group. Entropies may be differentiated; as long as nobody does, they cost no time backward.
    """
    if sequence_parallel:  # backward: reduce-scatter of the ranks' partial gradients
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tensor_group)
    else:  # backward: all-reduce of them
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tensor_group)
    rows = (labels_T != IGNORE).nonzero().squeeze(1) if labelled_N is None else labelled_N
    first = head_weight.shape[0] * tensor_group.rank()
    logp_N, entropy_N = linear_logprob(
        hidden.squeeze(1).index_select(0, rows),
        head_weight,
        labels_T[rows] - first,
        columns=max(0, min(head_weight.shape[0], vocab_size - first)),
        temperature=temperature,
        entropy=entropy,
        all_gather=_all_gather(tensor_group) if tensor_group.size() > 1 else None,
        workspace=workspace,
        backend=kernels,
        product=times_transposed if hidden.device.type == "cpu" and not plain() else None,
        gradient_buffer=_gradient_buffer,
    )
    nothing_T = torch.zeros(labels_T.shape, dtype=torch.float32, device=hidden.device)
    return nothing_T.index_copy(0, rows, logp_N), nothing_T.index_copy(0, rows, entropy_N) if entropy else None


def _all_gather(group: ProcessGroup):
    def gathered(mine: Tensor) -> Tensor:
        everyone = mine.new_empty(group.size() * mine.shape[0], *mine.shape[1:])
        if mine.numel():
            dist.all_gather_into_tensor(everyone, mine, group=group)
        return everyone.view(group.size(), *mine.shape)

    return gathered


def _gradient_buffer(weight: Tensor) -> Tensor | None:
    """megatron-core's gradient buffer, marked as added to; None where autograd must add: outside its DDP, and where an
    embedding shares the weight on this rank."""
    if not hasattr(weight, "grad_added_to_main_grad") or getattr(weight, "zero_out_wgrad", False):
        return None
    weight.grad_added_to_main_grad = True
    return weight.main_grad
