"""Boxes to buckets and back: the Triton kernel, in the interpreter, moves the bytes that torch's copies move."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tulu_kernels.buckets import BoxCopies, BucketPlan, plan_bucket
from tulu_kernels.buckets.plan import ALIGNMENT, ODD_TILE, TILE, VECTOR, launches

from tests.kernels.compiled import compiled
from tests.lib import world

pytestmark = pytest.mark.ranks

BF16, FP32 = torch.bfloat16, torch.float32
KINDS = [(BF16, BF16), (FP32, BF16), (FP32, FP32), (BF16, FP32)]


@given(st.lists(st.lists(st.integers(0, 70), max_size=2)), st.sampled_from([BF16, FP32]))
def test_boxes_lie_apart_and_aligned(shapes, dtype):
    plan = plan_bucket(shapes, dtype)
    ends = [at + math.prod(shape) * dtype.itemsize for at, shape in zip(plan.offsets, shapes, strict=True)]
    assert all(at % ALIGNMENT == 0 for at in plan.offsets)
    assert all(end <= at for end, at in zip(ends, [*plan.offsets, plan.nbytes][1:], strict=True))
    views = plan.views(torch.zeros(plan.nbytes, dtype=torch.uint8))
    assert [list(view.shape) for view in views] == shapes and all(view.dtype == dtype for view in views)


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Every kind of float: of all sizes, half-way between two bf16 numbers, 0 of both signs, infinite, not a number."""
    generator = torch.Generator().manual_seed(shape[0])
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).int()
    x = bits.view(FP32).clone()
    x.view(-1)[::5] = (bits.view(-1)[::5] & -65536 | 0x8000).view(FP32)
    x.view(-1)[:5] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])[: x.numel()]
    return x.to(dtype)


def boxes(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Parts of a shard's parameters: whole, by rows, by columns, of odd places and sizes; several tiles, a part of one, none."""
    shapes = (48, 512), (37, 53), (72,), (3 * TILE + 40,)
    wide, odd, norm, long = (numbers(*shape, dtype=dtype).to(device) for shape in shapes)
    return [
        wide, wide[8:16], wide[:, 64:128], wide[3:4, 8:24], odd, odd[2:9], odd[:, 1:30], odd[5:20, 7:8], norm, norm[1:],
        norm[8:40], long, long[:-1], wide[4:4], norm[:0], norm[0],
    ]  # fmt: skip


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """The same bytes; not-a-numbers need not be, when they were rounded."""
    return x.shape == y.shape and torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(nan=0.0), y.nan_to_num(nan=0.0))


def there_and_back(source: torch.dtype, target: torch.dtype, device: str = "cpu") -> list[str]:
    """What is wrong with a bucket that the kernel packed, and with boxes that it unpacked."""
    given_, wrong = boxes(source, device), []
    plan = plan_bucket([box.shape for box in given_], target)
    buckets = [torch.full((plan.nbytes,), 7, dtype=torch.uint8, device=device) for _ in range(2)]
    for backend, bucket in zip(("triton", "torch"), buckets, strict=True):
        BoxCopies(backend)(given_, plan.views(bucket))
    views = [plan.views(bucket) for bucket in buckets]
    wrong += [f"packed {box.shape}" for box, x, y in zip(given_, *views, strict=True) if not same(x, y)]
    for view in (*views[0], *views[1]):
        view.zero_()
    if not torch.equal(*buckets):
        wrong.append("bytes between boxes")

    plan = plan_bucket([box.shape for box in given_], source)
    bucket = torch.empty(plan.nbytes, dtype=torch.uint8, device=device)
    BoxCopies("torch")(given_, plan.views(bucket))
    made = []
    for backend in ("triton", "torch"):
        wide = torch.full((60, 700), 7, dtype=target, device=device)  # columns of a tensor's other parts must stay
        into = [wide[:48, 16:528], wide[50:58, 1:513]]
        BoxCopies(backend)(plan.views(bucket)[:2], into)
        made.append(wide)
    return wrong + ([] if same(*made) else ["unpacked"])


@pytest.mark.parametrize(("source", "target"), KINDS)
def test_the_kernel_is_torch_s_copies(source, target):
    assert world.run(1, there_and_back, source, target)[0] == []


def moved() -> list[bool]:
    """Whether copies that were planned notice new contents, boxes that lie elsewhere, and other targets."""
    copies, found = BoxCopies("triton"), []
    sources, targets = [torch.ones(9, 16), torch.ones(5)], [torch.zeros(9, 16), torch.zeros(5)]
    copies(sources, targets)
    planned = copies._tables
    sources[0].mul_(3)
    copies(sources, targets)
    found += [copies._tables is planned, bool((targets[0] == 3).all())]
    sources[1] = torch.full((5,), 4.0)
    copies(sources, targets)
    found += [copies._tables is not planned, targets[1].tolist() == [4.0] * 5]
    targets = [torch.zeros(9, 16), torch.zeros(5)]
    copies(sources, targets)
    return [*found, bool((targets[0] == 3).all()), targets[1].tolist() == [4.0] * 5]


def test_what_moved_is_planned_anew():
    assert world.run(1, moved)[0] == [True] * 6


def test_a_launch_for_each_kind():
    """However many boxes there are; the tables are plain arithmetic."""
    parameters = [torch.zeros(64, 32, dtype=BF16) for _ in range(50)] + [torch.zeros(33, dtype=BF16)]
    plan = plan_bucket([p.shape for p in parameters], FP32)
    aligned, odd = launches(parameters, plan.views(torch.zeros(plan.nbytes, dtype=torch.uint8)))
    assert (aligned.unit, odd.unit) == (VECTOR, 1) and len(aligned.lines) == 50 and len(odd.lines) == 1
    assert aligned.lines[3][1:] == (3 * 64 * 32 // VECTOR, 256, 256, 256, 256, 3) and sum(aligned.programs) == 50
    assert launches([], []) == []


def test_boxes_that_32_bits_do_not_count():
    """One at a time from 2^31 elements on, in vectors from eight times as many."""
    cases = (2**31 - ODD_TILE - 7, 1, False), (2**31 + 1, 1, True), (2**33, VECTOR, False), (2**34, VECTOR, True)
    for size, unit, wide in cases:
        box = torch.empty(size, dtype=BF16, device="meta")
        (launch,) = launches([box], [box])
        assert (launch.unit, launch.wide) == (unit, wide), size


def in_64_bits() -> bool:
    """Whether the kernel as it is for such boxes copies small ones."""
    from tulu_kernels.buckets import kernel

    source, target = torch.arange(1801.0)[1:].view(6, 300)[:, 3:80], torch.zeros(6, 77)
    (launch,) = launches([source], [target])
    assert launch.unit == 1
    kernel.copy([source], [target], kernel.Tables.of(replace(launch, wide=True), target.device))
    return torch.equal(source, target)


def test_64_bits():
    assert world.run(1, in_64_bits)[0]


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        (torch.zeros(4), torch.zeros(5), "expected equal shapes"),
        (torch.zeros(2, 2, 2), torch.zeros(2, 2, 2), "at most two dimensions"),
        (torch.zeros(4, 6)[:, ::2], torch.zeros(4, 3), "2 apart, expected 1"),
    ],
)
def test_refused(source, target, told):
    with pytest.raises(ValueError, match=told):
        BoxCopies("triton")([source], [target])


def test_a_plan_is_data():
    assert plan_bucket([(3,), (2, 2)], FP32) == BucketPlan(FP32, ((3,), (2, 2)), (0, 64), 128)


@pytest.mark.parametrize(("source", "target"), KINDS)
@pytest.mark.parametrize(("unit", "tile", "wide"), [(VECTOR, TILE, False), (1, ODD_TILE, False), (1, ODD_TILE, True)])
def test_compiled_for_an_h100(source, target, unit, tile, wide):
    from tulu_kernels.buckets import kernel

    names = {BF16: "*bf16", FP32: "*fp32"}
    made = compiled(
        kernel._copy,
        {"source": names[source], "target": names[target], "lines": "*i64", "box_of": "*i32"},
        dict(UNIT=unit, WIDE=wide, INTEGER=False, TILE=tile),
        kernel._WARPS,
        aligned=unit > 1,
    )
    assert made.stack == 0, made
    if unit == 1:
        assert made.registers <= 64, made  # four programs to a multiprocessor
    else:
        assert "ld.global.v4.b32" in made.loads and made.stores == {"st.global.v4.b32"}, made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("source", "target"), KINDS)
def test_on_a_gpu(source, target):
    assert there_and_back(source, target, "cuda") == []
