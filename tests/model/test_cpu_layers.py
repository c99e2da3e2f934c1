"""Products, norm and activation of the local spec on a CPU, against the formula in float64."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tulu_mega.model.swiglu import Swiglu
from tulu_mega.platforms.cpu_speed import matmul
from tulu_mega.platforms.cpu_speed.matmul import times_transposed
from tulu_mega.platforms.cpu_speed.norms import rms_norm


@pytest.fixture(params=["MKL", "oneDNN"])
def library(request, monkeypatch):
    """Each of the two, whichever is the faster one here."""
    if request.param == "oneDNN" and matmul.OPERATOR is None:
        pytest.skip("torch without oneDNN, or without its linear operator")
    monkeypatch.setattr(matmul, "_ONEDNN", matmul.OPERATOR if request.param == "oneDNN" else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 1, 24), (1, 24), (33, 24), (0, 24)])
@pytest.mark.parametrize("transposed", [False, True])
def test_product(shape, transposed, dtype, library):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn((24, 40) if transposed else (40, 24), generator=generator).to(dtype)
    weight = weight.t() if transposed else weight
    got = times_transposed(rows, weight)
    assert got.shape == (*shape[:-1], 40) and got.is_contiguous() and got.dtype == dtype
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got.double(), rows.double() @ weight.double().t(), **close)


def test_product_of_a_slice(library):
    rows, weight = torch.randn(12, 16)[3:9], torch.randn(40, 16)[:30]
    torch.testing.assert_close(times_transposed(rows, weight), rows @ weight.t(), rtol=1e-5, atol=1e-5)


def test_swiglu():
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(5, 1, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    gate, up = both.chunk(2, dim=-1)
    torch.testing.assert_close(Swiglu()(both), F.silu(gate) * up)
    assert torch.autograd.gradcheck(Swiglu(), both)
    # a gradient may come strided: that of a sum is expanded
    (wanted,) = torch.autograd.grad(F.silu(gate) * up, both, torch.ones(5, 1, 6, dtype=torch.float64))
    (got,) = torch.autograd.grad(Swiglu()(both), both, torch.ones(1, 1, 1, dtype=torch.float64).expand(5, 1, 6))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("shape", [(5, 1, 12), (3, 12), (4, 1, 2, 12), (0, 1, 12)])
def test_norm(shape):
    """Over the last dimension, of activations and of heads; as torch's own, with its gradients."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(12, dtype=torch.float64, generator=generator, requires_grad=True)
    ours, theirs = rms_norm(x, weight, 1e-5), F.rms_norm(x, (12,), weight, 1e-5)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(shape[::-1], dtype=torch.float64, generator=generator).permute(*range(len(shape))[::-1])  # strided
    for got, wanted in zip(*(torch.autograd.grad(each, (x, weight), upstream) for each in (ours, theirs)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_norm_in_float32_beside_float64():
    generator = torch.Generator().manual_seed(3)
    x, weight, upstream = (torch.randn(shape, generator=generator) for shape in ((935, 1, 512), (512,), (935, 1, 512)))
    x[7] = 0.0  # eps alone

    def gradients(norm, dtype):
        inputs = [each.to(dtype).requires_grad_() for each in (x, weight)]
        return torch.autograd.grad(norm(*inputs), inputs, upstream.to(dtype))

    exact = gradients(lambda x, weight: F.rms_norm(x, (512,), weight, 1e-6), torch.float64)
    for got, wanted in zip(gradients(lambda x, weight: rms_norm(x, weight, 1e-6), torch.float32), exact, strict=True):
        assert (got - wanted).abs().max() < 2e-6 * wanted.abs().max()


_HELD = """
import ctypes, torch
from tulu_mega.platforms.cpu_speed import matmul
from tulu_mega.platforms.cpu_speed.matmul import times_transposed

matmul.bound_caches()
matmul._ONEDNN = matmul.OPERATOR

class Account(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks used free top".split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Account
weight = torch.randn(448, 128)
for rows in range(600, 800):
    times_transposed(torch.randn(rows, 128), weight)
    if rows in (699, 799):
        print(library.mallinfo2().used)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's account of its heap")
def test_products_of_ever_other_lengths_hold_no_more_memory():
    ended = subprocess.run([sys.executable, "-c", _HELD], capture_output=True, text=True, check=True, timeout=120)
    after_100, after_200 = map(int, ended.stdout.split())
    assert after_200 - after_100 < 2**22  # 59 MB without a bound
