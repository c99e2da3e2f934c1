"""Products added to a float32 buffer, by what the torch at hand allows."""

from __future__ import annotations

import logging

import pytest
import torch
from tulu_kernels import weight_gradient
from tulu_kernels.weight_gradient import add_product

BF16, FP32 = torch.bfloat16, torch.float32


def factors(device: str = "cpu") -> list[torch.Tensor]:
    """A buffer with something in it, and what is multiplied."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((24, 40), FP32), ((100, 24), BF16), ((100, 40), BF16)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape, dtype in shapes]


def error(buffer: torch.Tensor) -> float:
    into, upstream, x = (each.double() for each in factors())
    return float((buffer.cpu() - (into + upstream.t() @ x)).abs().max())


def product_of(torch_version: str):
    """torch.addmm and torch.mm on CUDA, as their sources of a version have it, on a CPU."""
    real_addmm, real_mm = torch.addmm, torch.mm

    def checked(kinds: set[torch.dtype], out_dtype: torch.dtype | None, result: torch.Tensor) -> torch.Tensor:
        if torch_version == "2.7":
            raise TypeError("addmm() received an invalid combination of arguments")
        if len(kinds) > 1:
            raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
        assert result.dtype == out_dtype
        return result

    def addmm(into, left, right, *, out_dtype, out):
        kinds = {left.dtype, right.dtype} | ({into.dtype} if torch_version in ("2.8", "2.9") else set())
        return checked(kinds, out_dtype, real_addmm(into, left.to(out_dtype), right.to(out_dtype), out=out))

    def mm(left, right, *, out_dtype):
        return checked({left.dtype, right.dtype}, out_dtype, real_mm(left.to(out_dtype), right.to(out_dtype)))

    return addmm, mm


@pytest.mark.parametrize(
    ("version", "way"), [("2.7", "_of_converted"), ("2.8", "_through_a_temporary"), ("2.10", "_in_one_pass")]
)
def test_what_torch_refuses(monkeypatch, caplog, version, way):
    addmm, mm = product_of(version)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch, "mm", mm)
    caplog.set_level(logging.WARNING)
    found = weight_gradient._way.__wrapped__(FP32, BF16, torch.device("cpu"))
    assert found.__name__ == way
    assert [way.strip("_").replace("_", " ") in each.message for each in caplog.records] == [True] * (version != "2.10")
    buffer, upstream, x = factors()
    found(buffer, upstream.t(), x)
    assert error(buffer) < 1e-5


def test_on_a_cpu():
    buffer, upstream, x = factors()
    add_product(buffer, upstream, x)
    assert error(buffer) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    buffer, upstream, x = factors("cuda")
    add_product(buffer, upstream, x)
    assert error(buffer) < 1e-4
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10):
        assert weight_gradient._way(FP32, BF16, buffer.device) is weight_gradient._in_one_pass
