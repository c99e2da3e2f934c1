"""Copies of boxes of tensors, whichever way they are made."""

import pytest
import torch
from torch import nn

from tulu_mega.bridge import shards


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (7,), (0, 5), (33, 5), (4, 3, 2)])
def test_a_copy_is_as_torch_would_make_it(monkeypatch, shape, of, to):
    monkeypatch.setattr(shards, "_SLAB_BYTES", 64)  # several slabs
    source = torch.randn(shape).to(of)
    target = torch.full(shape, 9.0, dtype=to)
    shards.copy_in_slabs(target, source)
    assert torch.equal(target, source.to(to))


@pytest.mark.parametrize("side", ["source", "target", "both"])
def test_columns_of_a_matrix(side):
    wide = torch.zeros(6, 10)
    source = torch.randn(6, 10)[:, 2:6] if side != "target" else torch.randn(6, 4)
    target = wide[:, 3:7] if side != "source" else torch.zeros(6, 4)
    shards.copy_in_slabs(target, source)
    assert torch.equal(target, source)
    assert not wide[:, :3].any() and not wide[:, 7:].any()


def test_not_a_number_and_minus_zero_keep_their_bits():
    source = torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.bfloat16)
    target = torch.zeros_like(source)
    shards.copy_in_slabs(target, source)
    assert torch.equal(target.view(torch.int16), source.view(torch.int16))


def test_a_parameter_needs_no_gradient_here():
    parameter, target = nn.Parameter(torch.randn(4, 4)), torch.zeros(4, 4)
    with torch.no_grad():
        shards.copy_in_slabs(target, parameter)
    assert torch.equal(target, parameter)
