"""Sums over the sequences of a pack: torch's and the kernel's, in Triton's interpreter, against exact sums."""

from __future__ import annotations

import math

import pytest
import torch
from tulu_kernels.segment_sums import segment_sums

from tests.kernels.compiled import compiled
from tests.lib import world

pytestmark = pytest.mark.ranks

LENGTHS = {
    "odd": [3, 1, 12],
    "empty ones": [0, 5, 0, 0, 7, 0],
    "all empty": [0, 0],
    "as long as a block": [2048, 2048],
    "over blocks": [5, 4101, 1, 2043],
    "a block's last place": [2047, 1, 2049],
}


def drawn(lengths: list[int], dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    values, minus = (torch.randn(2, sum(lengths), generator=generator) * 9).to(dtype)
    return values, minus, torch.repeat_interleave(torch.tensor(lengths))


def sums(backend: str):
    found = {}
    for name, lengths in LENGTHS.items():
        values, minus, segments = drawn(lengths)
        values.requires_grad_()
        plain = segment_sums(values, segments, len(lengths), backend=backend)
        apart = segment_sums(values, segments, len(lengths), minus_T=minus, backend=backend)
        again = segment_sums(values, segments, len(lengths), minus_T=minus, backend=backend)
        weights = torch.arange(1.0, len(lengths) + 1, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(apart @ weights, values)
        found[name] = [x.detach().numpy() for x in (plain, apart, again, gradient)]
    return found


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sums(backend):
    for name, (plain, apart, again, gradient) in world.run(1, sums, backend)[0].items():
        values, minus, segments = drawn(LENGTHS[name])
        assert plain.dtype == apart.dtype == "float64" and gradient.dtype == "float32"
        for found, what in ((plain, values.double()), (apart, values.double() - minus.double())):
            parts = what.split(LENGTHS[name])
            assert list(found) == pytest.approx([math.fsum(part.tolist()) for part in parts], rel=1e-13, abs=1e-11), name
        assert (apart == again).all()
        assert (gradient == segments.numpy() + 1).all(), name


@pytest.mark.parametrize("minus", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "fp32", "fp64"])
def test_compiled_for_an_h100(kind, minus):
    from tulu_kernels.segment_sums import kernel

    made = compiled(
        kernel._sums,
        {"values": f"*{kind}", "minus": f"*{kind}", "first": "*i64", "sums": "*fp64", "count": "i32"},
        dict(MINUS=minus, BLOCK=kernel._BLOCK),
        kernel._WARPS,
    )
    wide = "ld.global.v2.b64" if kind == "fp64" else "ld.global.v4.b32"
    assert made.stack == 0 and wide in made.loads and not made.atomics, made
