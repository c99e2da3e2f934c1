"""The passes over chunks of rows: matrix products by the library, row work by torch or Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from tulu_kernels.dispatch import Backend, chosen
from tulu_kernels.linear_logprob import reference
from tulu_kernels.linear_logprob.combine import Row, combine, empty_shard, mass
from tulu_kernels.weight_gradient import add_product

WORKSPACE = 512 * 2**20
"""Bytes of logits that may exist at a time."""
TILE = 128
"""Rows that matrix products work on at a time."""


def linear_logprob(
    hidden_NH: Tensor,
    weight_VlH: Tensor,
    labels_N: Tensor,
    *,
    columns: int,
    temperature: float = 1.0,
    entropy: bool = False,
    all_gather: Callable[[Tensor], Tensor] | None = None,
    workspace: int = WORKSPACE,
    backend: Backend = "auto",
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
    gradient_buffer: Callable[[Tensor], Tensor | None] = lambda weight: None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of every row's label, and on request the entropy of the distribution it is drawn from.

        z_v = h . w_v / temperature     logp = z_label - logsumexp_v z_v     entropy = -sum_v p_v log p_v

    A chunk of rows bounds the workspace. Backward, the last chunk is still there (so that nothing is computed twice where one
    chunk holds everything) and the logits of the others are multiplied again. Statistics of rows are gathered once over the
    ranks, in one message of the same size whatever is asked, and added in the ranks' order.

    Args:
        hidden_NH: rows that have a label, the same on every rank; their gradient is this shard's share.
        weight_VlH: [V_l, H], this rank's shard of the output embedding.
        labels_N: int64, counted from this shard's first row; out of [0, V_l) where the label is another shard's.
        columns: rows of the shard that are no padding, first in it; may be 0.
        temperature: logits are divided by it, in float32.
        entropy: whether to give entropies; the log-probabilities are the same bits either way.
        all_gather: [N, 4] of this rank to [R, N, 4] of all ranks of the vocabulary; None where one rank has all of it.
        workspace: bytes of logits made at a time.
        backend: of the row work, see `dispatch.chosen`.
        product: ``x, w, space -> x @ w.t()`` for contiguous or transposed w, in place of torch's where torch does the row work;
            the first rows of `space`, where there is one, may hold the result.
        gradient_buffer: asked in the backward pass for a float32 [V_l, H] buffer to which the weight's gradient is added (and
            which it may mark as added to); None has the gradient returned to autograd.

    Returns:
        Log-probabilities and entropies (None unless asked for), each [N] float32 in nats. Entropies may be differentiated; as
        long as nobody does, they cost no time backward.
    """
    if chosen("linear_logprob", hidden_NH.device, backend) == "triton":
        from tulu_kernels.linear_logprob import rows

        product = rows.product
    else:
        rows = reference
        product = product or rows.product
    how = _How(columns, temperature, entropy, all_gather, workspace, rows, product, gradient_buffer)
    return _LinearLogProb.apply(hidden_NH, weight_VlH, labels_N, how)


@dataclass(frozen=True)
class _How:
    columns: int
    temperature: float
    entropy: bool
    all_gather: Callable[[Tensor], Tensor] | None
    workspace: int
    rows: ModuleType
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    gradient_buffer: Callable[[Tensor], Tensor | None]

    def chunks(self, rows: int) -> Iterator[slice]:
        """None where the shard is all padding."""
        if self.columns:
            yield from even_chunks(rows, max(1, self.workspace // (self.rows.BYTES * self.columns)))


def even_chunks(rows: int, most: int) -> Iterator[slice]:
    """As few slices of the rows as `most` allows, about equal, since matrix products dislike small ones; the last is the
    smallest, others are whole tiles or have `most` rows."""
    if not rows:
        return
    size = -(-rows // -(-rows // most))
    size = min(-(-size // TILE) * TILE, most)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VlH, labels_N, how: _How):
        ctx.set_materialize_grads(False)  # so that backward can tell what is asked of it
        weight_VrH = weight_VlH[: how.columns]
        stats_N4 = empty_shard(len(hidden_NH), hidden_NH.device)
        logits = kept = None
        for here in how.chunks(len(hidden_NH)):
            kept = None  # the chunk before
            logits = how.product(hidden_NH[here], weight_VrH, logits)
            stats_N4[here], kept = how.rows.statistics(logits, labels_N[here], how.temperature, how.entropy)
        row = combine(stats_N4[None] if how.all_gather is None else how.all_gather(stats_N4))
        ctx.save_for_backward(hidden_NH, weight_VlH, labels_N, mass(stats_N4, row), *vars(row).values())
        ctx.how, ctx.kept = how, kept
        return row.logp_N, row.entropy_N if how.entropy else None

    @staticmethod
    def backward(ctx, upstream_N, upstream_entropy_N):
        hidden_NH, weight_VlH, labels_N, mass_N, *of_rows = ctx.saved_tensors
        how, kept = ctx.how, ctx.kept
        ctx.kept = None  # its place is taken by the gradient
        weight_VrH = weight_VlH[: how.columns]
        if upstream_N is None:
            upstream_N = torch.zeros_like(mass_N)
        grad_hidden_NH = torch.zeros_like(hidden_NH) if not how.columns else torch.empty_like(hidden_NH)
        into = how.gradient_buffer(weight_VlH) if ctx.needs_input_grad[1] else None
        chunks = list(how.chunks(len(hidden_NH)))
        if into is not None:
            grad_VlH = into
        else:  # several chunks add up in float32, whatever the weights are
            grad_VlH = torch.zeros_like(weight_VlH, dtype=weight_VlH.dtype if len(chunks) < 2 else torch.float32)
        space = None
        # the kept one first: its memory is free for the others then
        for here in reversed(chunks):
            h = hidden_NH[here]
            if kept is None:
                kept = how.rows.again(how.product(h, weight_VrH, space), how.temperature)
                space = kept if kept.dtype == h.dtype else None
            # a sum's gradient is one number seen N times, a kernel reads N of them
            upstream = [None if u is None else u[here].contiguous() for u in (upstream_N, upstream_entropy_N)]
            row = Row(*(value_N[here] for value_N in of_rows))
            d_logits = how.rows.gradient(kept, labels_N[here], mass_N[here], *upstream, row, how.temperature).to(h.dtype)
            kept = None
            grad_hidden_NH[here] = how.product(d_logits, weight_VrH.t(), None)
            if ctx.needs_input_grad[1]:
                add_product(grad_VlH[: how.columns], d_logits, h)
            del d_logits
        if not ctx.needs_input_grad[1]:
            return grad_hidden_NH, None, None, None
        if into is not None:
            return grad_hidden_NH, torch.empty_like(weight_VlH), None, None  # never read: a hook waits for some gradient
        return grad_hidden_NH, grad_VlH.to(weight_VlH.dtype), None, None
