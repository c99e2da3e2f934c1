"""Fused attention on a CUDA device against torch's SDPA in float64, segment by segment."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

LENGTHS = (130, 1, 381, 188)
BOUNDS = [0, *itertools.accumulate(LENGTHS)]
HEADS, GROUPS, SIZE = 8, 2, 64


def attend(kernel: str, dtype: torch.dtype, window: int | None) -> list[torch.Tensor]:
    """Output and gradients of query, key and value."""
    from tulu_mega.model.attention import PackedAttention
    from tulu_mega.model.packed import PlacedSeqParams
    from tulu_mega.model.varlen import Spans

    config = SimpleNamespace(window_size=window and (window - 1, 0), window_attn_skip_freq=None, attention_dropout=0.0)
    alone = SimpleNamespace(cp=SimpleNamespace(rank=lambda: 0, size=lambda: 1))
    attention = PackedAttention(config, 1, None, "self", pg_collection=alone, kernel=kernel)
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(BOUNDS[-1], heads, SIZE, generator=generator) for heads in (HEADS, GROUPS, GROUPS)]
    inputs = [x.bfloat16().to("cuda", dtype).requires_grad_() for x in made]
    upstream = torch.randn(BOUNDS[-1], 1, HEADS * SIZE, generator=generator).bfloat16().to("cuda", dtype)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    packed = PlacedSeqParams("thd", spans=Spans(bounds, bounds, LENGTHS, LENGTHS))
    out = attention(*inputs, None, packed_seq_params=packed)
    out.backward(upstream)
    return [out.detach(), *(x.grad for x in inputs)]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("kernel", ["flash3", "flash2", "varlen"])
def test_fused_attention(kernel, window):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from tulu_mega.errors import UserError
    from tulu_mega.model.attention_choice import choose_attention, situation

    try:
        choose_attention(situation(torch.device("cuda", 0), torch.bfloat16, SIZE, window is not None, 1, False), kernel)
    except UserError as error:
        pytest.skip(str(error))
    truth = attend("sdpa", torch.float64, window)
    plain = attend("sdpa", torch.bfloat16, window)
    for got, rounded, want in zip(attend(kernel, torch.bfloat16, window), plain, truth, strict=True):
        # no further from the truth than torch's own bf16 attention, with some room
        assert (got - want).abs().mean() <= 1.5 * (rounded - want).abs().mean() + 1e-4
