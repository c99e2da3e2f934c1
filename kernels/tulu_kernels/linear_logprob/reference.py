"""Row work in torch, in float32: what the CPU runs, and what the Triton kernels are held against.

A chunk of logits becomes the softmax over its own shard in place, which is what the backward pass starts from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tulu_kernels.linear_logprob.combine import Row

BYTES = 4
"""of a logit in the workspace"""


def product(hidden_NH: Tensor, weight_VrH: Tensor, space: Tensor | None) -> Tensor:
    """Logits [N, V_r] in the weights' precision, in the first rows of `space` where there is one."""
    return torch.mm(hidden_NH, weight_VrH.t(), out=None if space is None else space[: len(hidden_NH)])


def statistics(logits_NV: Tensor, labels_N: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """Statistics of every row (see `combine`) and what `gradient` wants to have of the chunk.

    Args:
        logits_NV: as multiplied; lost.
        labels_N: int64, of this shard's columns; any other number where the label is another shard's.

    Returns:
        [N, 4] float32, and a tensor as large as the float32 logits.
    """
    logits_NV = _scaled(logits_NV, temperature)
    mine_N, inside_N = _own(labels_N, logits_NV.shape[1])
    target_N = torch.where(mine_N, logits_NV.gather(1, inside_N[:, None]).squeeze(1), 0.0)
    peak_N = logits_NV.amax(-1)
    # torch's softmax reads a row before it writes it; its largest is exp(0) / total
    softmax_NV = logits_NV.softmax(-1) if entropy else torch.softmax(logits_NV, -1, out=logits_NV)
    total_N = softmax_NV.amax(-1).reciprocal()
    # in place: another tensor of this size costs more in page faults than the arithmetic
    moment_N = logits_NV.sub_(peak_N[:, None]).mul_(softmax_NV).sum(-1) * total_N if entropy else torch.zeros_like(peak_N)
    return torch.stack([peak_N, total_N, target_N, moment_N], -1), softmax_NV


def again(logits_NV: Tensor, temperature: float) -> Tensor:
    """The second result of `statistics`, of logits multiplied once more; the same bits. Logits are lost."""
    logits_NV = _scaled(logits_NV, temperature)
    return torch.softmax(logits_NV, -1, out=logits_NV)


def gradient(
    kept_NV: Tensor,
    labels_N: Tensor,
    mass_N: Tensor,
    upstream_N: Tensor,
    upstream_entropy_N: Tensor | None,
    row: Row,
    temperature: float,
) -> Tensor:
    """Gradient [N, V_r] with respect to the logits as multiplied, in place of what was kept.

        d logp / d z_v = [v = label] - p_v     d entropy / d z_v = -p_v (log p_v + entropy)

    Args:
        kept_NV: second result of `statistics`.
        mass_N: probability that lies in this shard.
        upstream_N: gradient of the log-probabilities.
        upstream_entropy_N: and of the entropies, None where nobody asks.
        row: of these rows, over the whole vocabulary.
    """
    upstream_N = upstream_N / temperature
    mine_N, inside_N = _own(labels_N, kept_NV.shape[1])
    if upstream_entropy_N is None:
        kept_NV.mul_((-upstream_N * mass_N)[:, None])
    else:
        upstream_entropy_N = upstream_entropy_N / temperature
        kept_NV.mul_(mass_N[:, None])
        factor_NV = kept_NV.clamp(min=torch.finfo(torch.float32).tiny).log_()  # 0 log 0 is 0
        factor_NV.add_(row.entropy_N[:, None]).mul_(upstream_entropy_N[:, None]).add_(upstream_N[:, None])
        kept_NV.mul_(factor_NV.neg_())
    return kept_NV.scatter_add_(1, inside_N[:, None], torch.where(mine_N, upstream_N, 0.0)[:, None])


def _scaled(logits_NV: Tensor, temperature: float) -> Tensor:
    logits_NV = logits_NV.float()
    return logits_NV if temperature == 1.0 else logits_NV.div_(temperature)


def _own(labels_N: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which labels are this shard's, and an index inside it for all."""
    return (labels_N >= 0) & (labels_N < columns), labels_N.clamp(0, columns - 1)
