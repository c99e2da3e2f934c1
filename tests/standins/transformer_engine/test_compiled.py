"""The stand-ins for Transformer Engine's kernels against torch's autograd in float64, through its own modules and functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.lib import world

pytestmark = pytest.mark.ranks

ROWS, INPUT, OUTPUT = 128, 256, 384
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def away(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def rounded(x: torch.Tensor, rows: int, columns: int, kind: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Values of [N, K] after the cast to FP8, scaled by the largest magnitude of each block."""
    tiles = x.float().view(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
    scale = LARGEST[kind] / tiles.abs().amax((1, 3), keepdim=True)
    return ((tiles * scale).to(kind).float() / scale).view_as(x)


def recipe(kind: str):
    from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling, Format

    return Float8BlockScaling(fp8_format=Format.E4M3) if kind == "blockwise" else Float8CurrentScaling(fp8_format=Format.HYBRID)


def products(kind: str | None) -> dict[str, float]:
    """How far a linear layer with a norm before it, and its gradients, are from their definitions."""
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    dtype = torch.float32 if kind is None else torch.bfloat16
    layer = te.LayerNormLinear(INPUT, OUTPUT, bias=False, params_dtype=dtype, device="cpu", normalization="RMSNorm", eps=1e-5)
    plain = te.Linear(INPUT, OUTPUT, bias=False, params_dtype=dtype, device="cpu")
    x, up = torch.randn(ROWS, INPUT, dtype=dtype), torch.randn(ROWS, OUTPUT, dtype=dtype)
    with torch.no_grad():
        layer.layer_norm_weight.add_(0.2 * torch.randn(INPUT))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with te.fp8_autocast(enabled=kind is not None, fp8_recipe=kind and recipe(kind)):
        normed, out = layer(inputs[0]), plain(inputs[1])
    normed.backward(up)
    out.backward(up)

    if kind is None:
        exact = [each.detach().double().requires_grad_() for each in (x, layer.layer_norm_weight, layer.weight)]
        want = F.rms_norm(exact[0], (INPUT,), exact[1], 1e-5) @ exact[2].t()
        want.backward(up.double())
        grads = (inputs[0].grad, layer.layer_norm_weight.grad, layer.weight.grad)
        told = {name: away(grad, each.grad) for name, grad, each in zip(("dx", "dgamma", "dw"), grads, exact, strict=True)}
        return told | {"out": away(normed, want), "plain": away(out, x.double() @ plain.weight.double().t())}

    by_row, square = ((1, 128), (128, 128)) if kind == "blockwise" else (None, None)
    gradients = torch.float8_e4m3fn if kind == "blockwise" else torch.float8_e5m2

    def cast(values, blocks, kind=torch.float8_e4m3fn):
        return rounded(values.contiguous(), *(blocks or values.shape), kind)

    weight = plain.weight.detach()
    norm = F.rms_norm(x.float(), (INPUT,), layer.layer_norm_weight.detach().float(), 1e-5).bfloat16()
    return {
        "normed": away(normed, cast(norm, by_row) @ cast(layer.weight.detach(), square).t()),
        "out": away(out, cast(x, by_row) @ cast(weight, square).t()),
        "dx": away(inputs[1].grad, cast(up, by_row, gradients) @ cast(weight, square)),
        "dw": away(plain.weight.grad, cast(up.t(), by_row, gradients) @ cast(x.t(), by_row).t()),
    }


@pytest.mark.parametrize(("kind", "bound"), [(None, 1e-6), ("blockwise", 3e-3), ("tensorwise", 3e-3)])
def test_products(kind, bound):
    """FP8's results are rounded to bf16; without FP8 they are 4e-2 away."""
    told = world.run(1, products, kind)[0]
    assert max(told.values()) < bound, told


LENGTHS, HEADS, GROUPS, SIZE = (24, 8, 40), 4, 2, 16


def attention(window: int | None) -> dict[str, float]:
    """How far packed attention and its gradients are from softmax written out."""
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    total = sum(LENGTHS)
    query, key, value, up = (torch.randn(total, heads, SIZE).bfloat16() for heads in (HEADS, GROUPS, GROUPS, HEADS))
    given = [each.clone().requires_grad_() for each in (query, key, value)]
    core = te.DotProductAttention(
        HEADS, SIZE, num_gqa_groups=GROUPS, attn_mask_type="padding_causal", qkv_format="thd",
        window_size=None if window is None else (window, 0),
    )  # fmt: skip
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    options = dict(cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS))
    out = core(*given, **options)
    out.backward(up.reshape(total, -1))

    exact = [each.double().requires_grad_() for each in (query, key, value)]
    back = torch.arange(total)[:, None] - torch.arange(total)
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = (back >= 0) & (segment[:, None] == segment) & (back <= (total if window is None else window))
    keys, values = (each.repeat_interleave(HEADS // GROUPS, 1) for each in exact[1:])
    scores = torch.einsum("qhd,khd->hqk", exact[0], keys) * SIZE**-0.5
    want = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values).reshape(total, -1)
    want.backward(up.double().reshape(total, -1))
    told = {name: away(a.grad, b.grad) for name, a, b in zip(("dq", "dk", "dv"), given, exact, strict=True)}
    return told | {"out": away(out, want)}


@pytest.mark.parametrize("window", [None, 11])
def test_attention(window):
    told = world.run(1, attention, window)[0]
    assert max(told.values()) < 6e-3, told
