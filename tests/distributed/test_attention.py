"""Packed attention, with and without windows and context parallelism, against masked softmax written out in float64."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from tests.distributed import world
from tulu_mega.data.batch import context_rows

BOUNDS = [0, 24, 32, 72, 80]
HEADS, GROUPS, SIZE = 4, 2, 8


def case():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(BOUNDS[-1], heads, SIZE, generator=generator) for heads in (HEADS, GROUPS, GROUPS, HEADS)]


def ours(window: int | None, scale: float | None, tensor: int):
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection

    from tulu_mega import platforms, topology
    from tulu_mega.config import ParallelSettings
    from tulu_mega.model.attention import PackedAttention

    size = int(os.environ["WORLD_SIZE"]) // tensor
    place = topology.start(ParallelSettings(tensor=tensor, context=size), platforms.install(), seed=0)
    # layers 1 and 2 of 3 have the window; megatron-core counts layers from 1
    config = SimpleNamespace(window_size=window and (window - 1, 0), window_attn_skip_freq=[1, 1, 0], attention_dropout=0.0)
    answers = []
    for layer in (2, 3):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        attention = PackedAttention(config, layer, None, "self", softmax_scale=scale, pg_collection=groups)
        rows = context_rows(torch.tensor(BOUNDS), place.context_rank, size) if size > 1 else slice(None)
        query, key, value, upstream = (x[rows].clone() for x in case())
        inputs = [x.requires_grad_() for x in (query, key, value)]
        bounds = torch.tensor(BOUNDS, dtype=torch.int32)
        out = attention(*inputs, None, packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds))
        out.backward(upstream.reshape(out.shape))
        answers.append([x.detach().numpy() for x in (out.view(-1, HEADS, SIZE), query.grad, key.grad, value.grad)])
    return (rows.numpy() if size > 1 else None), answers


def truth(window: int | None, scale: float | None):
    query, key, value, upstream = (x.double() for x in case())
    inputs = [x.requires_grad_() for x in (query, key, value)]
    segment = torch.bucketize(torch.arange(BOUNDS[-1]), torch.tensor(BOUNDS), right=True)
    back = torch.arange(BOUNDS[-1])[:, None] - torch.arange(BOUNDS[-1])
    seen = (segment[:, None] == segment) & (back >= 0) & (back < (window or BOUNDS[-1]))
    keys, values = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * (scale or SIZE**-0.5)
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    out.backward(upstream)
    return [out.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize(
    ("size", "window", "scale", "tensor"),
    [(1, None, None, 1), (1, 5, 0.3, 1), (2, None, 0.3, 1), (2, 5, None, 1), (4, 17, None, 1), (2, 1, None, 2)],
)
def test_values_and_gradients(size, window, scale, tensor):
    ranks = world.run(size * tensor, ours, window, scale, tensor)
    for layer, reach in enumerate((window, None)):
        whole = [torch.zeros_like(x) for x in truth(reach, scale)]
        for rows, answers in ranks:
            for target, part in zip(whole, answers[layer], strict=True):
                target[rows if rows is not None else slice(None)] = torch.from_numpy(part).double()
        for got, want in zip(whole, truth(reach, scale), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
