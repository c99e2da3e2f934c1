"""The linear log-prob's kernels, in Triton's interpreter, and its torch path, against torch autograd in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tulu_kernels.linear_logprob.function import TILE, even_chunks

from tests.kernels.compiled import compiled
from tests.lib import world

pytestmark = pytest.mark.ranks

FLOAT_BF16 = 2.0**-8
"""relative spacing of bf16 numbers"""


def answers(backend, rows, vocabulary, columns, scale, temperature, entropy, rows_a_chunk, dtype, device="cpu"):
    """Value, entropy and gradients of one case, ours and float64 autograd's."""
    from tulu_kernels.linear_logprob import linear_logprob, reference

    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden = torch.randn(rows, 16, generator=generator).to(device, dtype)
    weight = (torch.randn(vocabulary, 16, generator=generator) * scale).to(device, dtype)
    labels = torch.randint(0, max(columns, 1), (rows,), generator=generator).to(device)
    upstream = torch.randn(2, rows, generator=generator).to(device)

    def graded(value, entropies, leaves):
        loss = upstream[0].to(value.dtype) @ value
        if entropy:
            loss = loss + upstream[1].to(value.dtype) @ entropies
        return [value.detach().double()] + [g.double() for g in torch.autograd.grad(loss, leaves)]

    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    bytes_a_logit = 2 if backend == "triton" else reference.BYTES
    value, entropies = linear_logprob(
        *leaves, labels, columns=columns, temperature=temperature, entropy=entropy, backend=backend,
        workspace=bytes_a_logit * columns * rows_a_chunk,
    )  # fmt: skip
    ours = graded(value, entropies, leaves) + ([entropies.detach().double()] if entropy else [])

    leaves = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    logits = leaves[0] @ leaves[1][:columns].t()
    if dtype is torch.bfloat16:  # logits are rounded where they are stored; the gradient passes through
        logits = logits + (logits.detach().to(dtype).double() - logits.detach())
    full = (logits / temperature).log_softmax(-1)
    value, entropies = full.gather(1, labels[:, None]).squeeze(1), -(full.exp() * full).sum(-1)
    theirs = graded(value, entropies, leaves) + ([entropies.detach()] if entropy else [])
    return ours, theirs


CASES = {
    "odd": dict(rows=7, vocabulary=53, columns=50, scale=1.0, temperature=1.0, entropy=False, rows_a_chunk=3),
    "one chunk": dict(rows=7, vocabulary=53, columns=50, scale=1.0, temperature=0.7, entropy=True, rows_a_chunk=99),
    "wider than a block": dict(rows=3, vocabulary=9001, columns=8999, scale=1.0, temperature=1.3, entropy=True, rows_a_chunk=2),
    "whole blocks": dict(rows=2, vocabulary=8192, columns=8192, scale=1.0, temperature=1.0, entropy=True, rows_a_chunk=2),
    "logits of 10,000": dict(rows=6, vocabulary=70, columns=61, scale=3e3, temperature=1.0, entropy=True, rows_a_chunk=4),
    "one column": dict(rows=3, vocabulary=4, columns=1, scale=1.0, temperature=1.0, entropy=True, rows_a_chunk=2),
    "no rows": dict(rows=0, vocabulary=10, columns=10, scale=1.0, temperature=1.0, entropy=True, rows_a_chunk=2),
}


def all_answers(backend, dtype, device="cpu"):
    torch.manual_seed(0)
    return {
        name: [[x.cpu().numpy() for x in side] for side in answers(backend, **case, dtype=dtype, device=device)]
        for name, case in CASES.items()
    }


def expect_float32(found, spacing=3e-6):
    for name, (ours, theirs) in found.items():
        for what, x, y in zip(("logp", "d hidden", "d weight", "entropy"), ours, theirs, strict=False):
            bound = (spacing if "10,000" not in name else 1e-3) * (1 + abs(y).max(initial=0))
            assert abs(x - y).max(initial=0) <= bound, (name, what, abs(x - y).max(), bound)
        if CASES[name]["columns"] == 1:
            assert (ours[0] == 0).all() and (ours[1] == 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float32(backend):
    expect_float32(world.run(1, all_answers, backend, torch.float32)[0])


def expect_bf16(found):
    """Logits and their gradient are stored in bf16: values as exact as in float32, gradients to a few roundings."""
    for name, (ours, theirs) in found.items():
        if "10,000" in name:
            continue  # differences of logits are rounded to 32 there: nothing to compare
        for what, x, y in zip(("logp", "d hidden", "d weight", "entropy"), ours, theirs, strict=False):
            bound = (6 * FLOAT_BF16 if what.startswith("d ") else 2e-2) * (1 + abs(y).max(initial=0))
            assert abs(x - y).max(initial=0) <= bound, (name, what, abs(x - y).max(), bound)


def test_bf16():
    expect_bf16(world.run(1, all_answers, "triton", torch.bfloat16)[0])


def chunk_sizes(backend):
    case = CASES["wider than a block"] | dict(rows=5)
    return [[x.numpy() for x in answers(backend, **case | dict(rows_a_chunk=n), dtype=torch.float32)[0]] for n in (1, 2, 5)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_chunks_change_nothing(backend):
    first, *others = world.run(1, chunk_sizes, backend)[0]
    for other in others:
        for x, y in zip(first, other, strict=True):
            assert abs(x - y).max() <= 4e-6 * (1 + abs(x).max())


@given(rows=st.integers(0, 5000), most=st.integers(1, 1500))
def test_chunks_are_few_and_even(rows, most):
    chunks = list(even_chunks(rows, most))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert len(sizes) == -(-rows // most) and max(sizes, default=0) <= most
    assert all(size == sizes[0] and (size == most or size % TILE == 0) for size in sizes[:-1])
    assert not sizes or 0 < sizes[-1] <= sizes[0]


def spaces(entropy):
    """Of a pass over four chunks: whether each product of logits had memory to use, and by how many rows that was too short."""
    from tulu_kernels.linear_logprob import linear_logprob, reference

    torch.manual_seed(4)
    hidden, weight = torch.randn(10, 8, requires_grad=True), torch.randn(20, 8)
    had, short = [], 0

    def product(rows_NK, weight_MK, space):
        nonlocal short
        if len(weight_MK) == 20:
            had.append(space is not None)
            short = max(short, len(rows_NK) - len(space) if had[-1] else 0)
        return reference.product(rows_NK, weight_MK, space)

    value, entropies = linear_logprob(
        hidden, weight, torch.arange(10), columns=20, workspace=4 * 20 * 3, entropy=entropy, product=product
    )
    (value.sum() + entropies.sum() if entropy else value.sum()).backward()
    return had, short


@pytest.mark.parametrize("entropy", [False, True])
def test_chunks_share_memory(entropy):
    """New memory is slow to touch: it is asked for once forward and once backward, the last chunk being kept in between."""
    forward, backward = [False, True, True, True], [False, True, True]
    assert world.run(1, spaces, entropy)[0] == (forward + backward, 0)


def statistics(negative: bool):
    from tulu_kernels.linear_logprob import reference, rows

    logits = torch.randn(4, 99, generator=torch.Generator().manual_seed(1)) * 9 - (500 if negative else 0)
    labels = torch.tensor([0, 98, -3, 99])
    wide = torch.full((4, 104), 1e9)  # what lies between a row's end and the next one must not be seen
    wide[:, :99] = logits
    got, kept = rows.statistics(wide[:, :99], labels, 0.8, True)
    want, _ = reference.statistics(logits.clone(), labels, 0.8, True)
    return got.numpy(), want.numpy(), bool((kept == logits).all())


@pytest.mark.parametrize("negative", [False, True])
def test_statistics_of_shards(negative):
    """A peak does not start at 0; labels of other shards give 0; columns beyond the shard are not read."""
    got, want, untouched = world.run(1, statistics, negative)[0]
    assert untouched
    assert abs(got - want).max() <= 2e-5 * abs(want).max()
    assert (got[2:, 2] == 0).all()


def buffers(dtype, device="cpu"):
    """The weight's gradient given to autograd, and what a float32 buffer of ones grew by."""
    from tulu_kernels.linear_logprob import linear_logprob

    torch.manual_seed(3)
    hidden, weight = torch.randn(6, 8).to(device, dtype), torch.randn(20, 8).to(device, dtype)
    labels, buffer = torch.arange(6, device=device), torch.ones(20, 8, device=device)
    grown = []
    for into in (None, buffer):
        leaf = weight.clone().requires_grad_()
        value, _ = linear_logprob(hidden, leaf, labels, columns=18, workspace=4 * 18 * 2, gradient_buffer=lambda w, b=into: b)
        value.sum().backward()
        grown.append(leaf.grad if into is None else buffer - 1)
    return [g.float().cpu().numpy() for g in grown]


def expect_the_same(dtype, plain, grown):
    assert abs(plain[:18]).max() > 0.1 and (grown[18:] == 0).all()
    assert abs(plain - grown).max() <= (1e-6 if dtype is torch.float32 else FLOAT_BF16) * abs(plain).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_buffer(dtype):
    expect_the_same(dtype, *world.run(1, buffers, dtype)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    """The compiled kernels, and cuBLAS's product into a float32 buffer."""
    torch.set_float32_matmul_precision("highest")  # some images allow TF32
    found = all_answers("triton", dtype, "cuda")
    if dtype is torch.float32:
        expect_float32(found, 1e-5)  # exponentials and divisions of a GPU are a bit or two less exact
    else:
        expect_bf16(found)
    expect_the_same(dtype, *buffers(dtype, "cuda"))


NUMBERS = dict(stride_8="i32", columns="i32", temperature="fp32")


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_compiled_for_an_h100(kind):
    from tulu_kernels.linear_logprob import rows
    from tulu_kernels.linear_logprob.combine import LOWEST

    for entropy in (False, True):
        made = compiled(
            rows._statistics,
            {"logits": f"*{kind}", "labels": "*i64", "stats": "*fp32"} | NUMBERS,
            dict(LOWEST=LOWEST, MOMENT=entropy, LANES=rows._LANES),
            rows._WARPS,
        )
        assert made.stack == 0 and "ld.global.v4.b32" in made.loads, made
        arrays = {"logits": f"*{kind}", "labels": "*i64"}
        arrays |= dict.fromkeys(("peaks", "log_totals", "entropies", "upstream", "upstream_entropy"), "*fp32")
        made = compiled(rows._gradient, arrays | NUMBERS, dict(ENTROPY=entropy, LANES=rows._LANES), rows._WARPS)
        assert made.stack == 0 and "ld.global.v4.b32" in made.loads and made.stores == {"st.global.v4.b32"}, made
