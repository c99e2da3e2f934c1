"""Packed attention, with and without windows and context parallelism, against masked softmax written out in float64."""

from __future__ import annotations

import inspect
import itertools
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.lib import world
from tulu_mega.layout.context import context_rows

pytestmark = pytest.mark.ranks

LENGTHS = (24, 8, 40, 8)
BOUNDS = [0, *itertools.accumulate(LENGTHS)]
HEADS, GROUPS, SIZE = 4, 2, 8
SHARED = {1: 0, 2: 0}
"""segments that see another one's keys before their own, where prefixes are shared"""


def case():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(BOUNDS[-1], heads, SIZE, generator=generator) for heads in (HEADS, GROUPS, GROUPS, HEADS)]


def spans_one_by_one(query, key, value, cu_q, cu_k, max_q, max_k, scale, window):
    """What the fused kernels compute, from their documentation: the last query of a span is as far as its last key."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
    assert cu_q[-1] == len(query) and cu_k[-1] == len(key) == len(value)
    outputs = []
    for (q, r), (k, m) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        back = torch.arange(m - k - (r - q), m - k)[:, None] - torch.arange(m - k)
        seen = (back >= -window[1]) & ((back <= window[0]) | (window[0] < 0))
        keys, values = (x[k:m].repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q:r], keys) * (scale or query.shape[2] ** -0.5)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


def stand_in(kernel: str) -> None:
    """The fused kernel's function, with its arguments as its library has them, computed on the CPU; of ``varlen_2.11`` as that
    torch has them."""
    if kernel.startswith("varlen"):
        from torch.nn.attention import varlen

        real = inspect.signature(varlen.varlen_attn)
        grouped = kernel == "varlen"
        if not grouped:
            real = real.replace(parameters=[each for name, each in real.parameters.items() if name != "enable_gqa"])

        def varlen_attn(*args, **kwargs):
            call = real.bind(*args, **kwargs)
            call.apply_defaults()
            given = SimpleNamespace(**call.arguments)
            assert given.enable_gqa if grouped else given.query.shape[1] == given.key.shape[1]
            assert given.window_size[1] == 0
            packed = (given.query, given.key, given.value, given.cu_seq_q, given.cu_seq_k, given.max_q, given.max_k)
            return spans_one_by_one(*packed, given.scale, given.window_size)

        varlen_attn.__signature__ = real
        varlen.varlen_attn = varlen_attn
    elif kernel != "sdpa":

        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale=None, causal=False,
            window_size=(-1, -1), deterministic=False,
        ):  # fmt: skip
            assert causal and not deterministic
            packed = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            out = spans_one_by_one(*packed, softmax_scale, window_size)
            return (out, None) if kernel == "flash3" else out

        module = ModuleType({"flash3": "flash_attn_interface", "flash2": "flash_attn"}[kernel])
        module.flash_attn_varlen_func = flash_attn_varlen_func
        sys.modules[module.__name__] = module


def placed_params(shared: bool):
    """Of the case's pack; where `shared`, some segments share a prefix."""
    from tulu_mega.model.packed import PlacedSeqParams
    from tulu_mega.model.varlen import Spans

    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    if not shared:
        return PlacedSeqParams("thd", spans=Spans(bounds, bounds, LENGTHS, LENGTHS))
    segments = [torch.arange(a, b) for a, b in itertools.pairwise(BOUNDS)]
    rows = [torch.cat([segments[SHARED[at]], own]) if at in SHARED else own for at, own in enumerate(segments)]
    keys = tuple(map(len, rows))
    cu_keys = torch.tensor([0, *itertools.accumulate(keys)], dtype=torch.int32)
    return PlacedSeqParams("thd", spans=Spans(bounds, cu_keys, LENGTHS, keys), key_rows_K=torch.cat(rows))


def ours(window: int | None, scale: float | None, tensor: int, kernel: str = "sdpa", shared: bool = False):
    from megatron.core.process_groups_config import ProcessGroupCollection

    from tulu_mega import platforms
    from tulu_mega.config import ParallelSettings
    from tulu_mega.distributed import topology
    from tulu_mega.model.attention import PackedAttention

    stand_in(kernel)
    size = int(os.environ["WORLD_SIZE"]) // tensor
    place = topology.start(ParallelSettings(tensor=tensor, context=size), platforms.install(), seed=0)
    # layers 1 and 2 of 3 have the window; megatron-core counts layers from 1
    config = SimpleNamespace(window_size=window and (window - 1, 0), window_attn_skip_freq=[1, 1, 0], attention_dropout=0.0)
    answers = []
    for layer in (2, 3):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        attention = PackedAttention(config, layer, None, "self", scale, groups, kernel=kernel.split("_")[0])
        rows = context_rows(LENGTHS, place.context_rank, size) if size > 1 else slice(None)
        query, key, value, upstream = (x[rows].clone() for x in case())
        inputs = [x.requires_grad_() for x in (query, key, value)]
        out = attention(*inputs, None, packed_seq_params=placed_params(shared))
        out.backward(upstream.reshape(out.shape))
        answers.append([x.detach().numpy() for x in (out.view(-1, HEADS, SIZE), query.grad, key.grad, value.grad)])
    return (rows.numpy() if size > 1 else None), answers


def truth(window: int | None, scale: float | None, shared: bool = False):
    query, key, value, upstream = (x.double() for x in case())
    inputs = [x.requires_grad_() for x in (query, key, value)]
    segment = torch.bucketize(torch.arange(BOUNDS[-1]), torch.tensor(BOUNDS), right=True)
    back = torch.arange(BOUNDS[-1])[:, None] - torch.arange(BOUNDS[-1])
    seen = segment[:, None] == segment
    if shared:
        place = torch.arange(BOUNDS[-1]) - torch.tensor(BOUNDS)[segment - 1]
        for after, before in SHARED.items():
            seen |= (segment[:, None] - 1 == after) & (segment - 1 == before)
            place[segment - 1 == after] += BOUNDS[before + 1] - BOUNDS[before]
        back = place[:, None] - place
    seen = seen & (back >= 0) & (back < (window or BOUNDS[-1]))
    keys, values = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * (scale or SIZE**-0.5)
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    out.backward(upstream)
    return [out.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize(
    ("size", "window", "scale", "tensor", "kernel"),
    [
        (1, None, None, 1, "sdpa"), (1, 5, 0.3, 1, "sdpa"), (2, None, 0.3, 1, "sdpa"), (2, 5, None, 1, "sdpa"),
        (4, 17, None, 1, "sdpa"), (2, 1, None, 2, "sdpa"),
        (1, 5, 0.3, 1, "varlen"), (2, 5, None, 1, "flash3"), (2, 17, 0.3, 1, "flash2"), (4, 1, None, 1, "varlen_2.11"),
    ],
)  # fmt: skip
def test_values_and_gradients(size, window, scale, tensor, kernel):
    ranks = world.run(size * tensor, ours, window, scale, tensor, kernel)
    for layer, reach in enumerate((window, None)):
        whole = [torch.zeros_like(x) for x in truth(reach, scale)]
        for rows, answers in ranks:
            for target, part in zip(whole, answers[layer], strict=True):
                target[rows if rows is not None else slice(None)] = torch.from_numpy(part).double()
        for got, want in zip(whole, truth(reach, scale), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "kernel"), [(None, "sdpa"), (17, "sdpa"), (5, "varlen"), (None, "flash3"), (17, "flash2")])
def test_shared_prefixes(window, kernel):
    [(_, answers)] = world.run(1, ours, window, None, 1, kernel, True)
    for got, reach in zip(answers, (window, None), strict=True):
        for part, want in zip(got, truth(reach, None, shared=True), strict=True):
            torch.testing.assert_close(torch.from_numpy(part).double(), want, rtol=1e-5, atol=1e-5)
