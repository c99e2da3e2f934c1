"""Block-scaled E4M3: our arithmetic against vLLM's, the Triton kernel against ours, both to the bit; plans of shards."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tulu_kernels.fp8_blocks import BLOCK, NotAligned, PackPlan, Piece, pack, plan_pack, quantize
from tulu_kernels.fp8_blocks.reference import dequantize

from tests.kernels.compiled import compiled
from tests.lib import world
from tulu_mega.bridge.families import llama
from tulu_mega.distributed.grid import ShardGrid

pytestmark = pytest.mark.ranks

BY_VLLM = """
import sys, torch
from vllm.utils.deep_gemm import per_block_cast_to_fp8
cast = getattr(per_block_cast_to_fp8, "_torchdynamo_orig_callable", per_block_cast_to_fp8)  # as written, not compiled
weights = torch.load(sys.argv[1], weights_only=True)
torch.save([[x.view(torch.uint8) if x.element_size() == 1 else x for x in cast(w)] for w in weights], sys.argv[2])
"""


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    made = [torch.randn(shape, generator=generator) for shape in ((256, 384), (130, 100), (1, 1), (300, 257))]
    made[0][:BLOCK, :BLOCK] = 0  # a block of zeros
    made[0][BLOCK:, :BLOCK] *= 10.0 ** torch.randint(-9, 5, (BLOCK, BLOCK), generator=generator)  # smallest numbers of E4M3
    made[3] *= 1e4
    made.append(torch.randn(BLOCK, 140, generator=generator) * 1e-39)  # of which float32 has few bits left
    return [w.to(dtype) for w in made for dtype in (torch.bfloat16, torch.float32)]


def test_as_vllm(tmp_path):
    torch.save(weights(), tmp_path / "weights.pt")
    command = [sys.executable, "-c", BY_VLLM, str(tmp_path / "weights.pt"), str(tmp_path / "theirs.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for weight, (numbers, scales) in zip(weights(), torch.load(tmp_path / "theirs.pt", weights_only=True), strict=True):
        ours, of_blocks = quantize(weight)
        assert torch.equal(ours.view(torch.uint8), numbers) and torch.equal(of_blocks, scales)


def test_error_is_half_a_step():
    """Three bits of mantissa: a sixteenth of a number, or half of the least step of its block."""
    for weight in weights():
        numbers, scales = quantize(weight)
        step = dequantize(torch.ones_like(numbers), scales) * 2.0**-9
        error = (dequantize(numbers, scales) - weight.float()).abs()
        assert (error <= torch.maximum(weight.float().abs() / 16, step / 2) * (1 + 1e-5)).all()


def packed(backend: str, device: str = "cpu", given=weights):
    """Bytes and scales of every weight, each as two boxes that change places where it has two rows of blocks."""
    made = []
    for weight in given():
        rows, columns = weight.shape
        middle = BLOCK if rows > BLOCK else rows
        parts = [(0, middle), (middle, rows)][: 1 + (rows > middle)]
        boxes = [Piece("w", (rows, columns), ((a, b), (0, columns)), ((a, b), (0, columns))) for a, b in reversed(parts)]
        plan = plan_pack(boxes)
        into, scales = torch.full((plan.bytes,), 7, dtype=torch.uint8, device=device), torch.zeros(plan.scales, device=device)
        pack(weight.to(device), plan, into, scales, backend=backend)
        made.append((into.cpu().numpy(), scales.cpu().numpy()))
    return made


def test_the_kernel_is_its_reference():
    for (bytes_, scales), (theirs, their_scales) in zip(packed("torch"), world.run(1, packed, "triton")[0], strict=True):
        assert (bytes_ == theirs).all() and (scales == their_scales).all()


def broken() -> list[torch.Tensor]:
    """A NaN of either sign, or infinite numbers, each in one block of four."""
    made = []
    for at, wrong in (((3, 5), math.nan), ((200, 7), -math.nan), ((255, 255), math.inf), ((0, 130), -math.inf)):
        weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
        weight[at] = wrong
        made += [weight.bfloat16(), weight]
    return made


def alike(ours, theirs) -> bool:
    """The same bytes and scales, NaN in the same places, whatever its sign."""
    (bytes_, scales), (their_bytes, their_scales) = ours, theirs
    none = (bytes_ & 0x7F) == 0x7F
    same_nans = (none == ((their_bytes & 0x7F) == 0x7F)).all()
    return bool(same_nans and (none | (bytes_ == their_bytes)).all() and np.array_equal(scales, their_scales, equal_nan=True))


def test_what_is_no_number_stays_none():
    """Its block's scale is none either, so that nobody decodes something finite."""
    torchs = packed("torch", given=broken)
    assert all(map(alike, world.run(1, packed, "triton", "cpu", broken)[0], torchs))
    for at, (bytes_, scales) in enumerate(torchs):
        assert (~np.isfinite(scales)).sum() == 1
        assert ((bytes_ & 0x7F) == 0x7F).sum() == (BLOCK * BLOCK if at < 4 else 1)


def test_scales_are_divided_by_what_lies_on_the_device():
    """By a number of the host torch does not divide on CUDA: it multiplies by the rounded inverse."""
    divisors = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.div:
                divisors.append(args[1])
            return func(*args, **(kwargs or {}))

    with Watch():
        quantize(torch.empty(256, 130, device="meta"))
    assert [isinstance(each, torch.Tensor) and each.device.type for each in divisors] == ["meta"]


def every_number():
    """Numbers all over E4M3's range, its own and those half-way between two, rounded by the kernel and by torch."""
    import triton

    from tests.kernels.rounding import rounded

    own = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    spread = torch.arange(0, 0x43E00000, 0x3FFF, dtype=torch.int32).view(torch.float32)
    x = torch.cat([spread, own, (own[1:] + own[:-1]) / 2, own * 1.0000001])
    x = torch.cat([x, -x])
    out = torch.empty(len(x), dtype=torch.uint8)
    rounded[(triton.cdiv(len(x), 4096),)](x, out, len(x), BLOCK=4096)
    return out.numpy(), x.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def test_rounding():
    ours, torchs = world.run(1, every_number)[0]
    assert len(ours) > 100_000 and (ours == torchs).all()


def test_shards_of_a_fused_projection():
    """A rank's queries, keys and values, interleaved by group, come out in the tensors' order, as if quantized whole."""
    config = dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4, head_dim=128,
        vocab_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    family = llama.FAMILY
    shapes = family.hf_shapes(config)
    generator = torch.Generator().manual_seed(4)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items() if len(shape) == 2}
    for parameter in ("decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.0.mlp.linear_fc1.weight"):
        for rank in range(2):
            pieces = family.pieces(parameter, config, ShardGrid(tensor=2, rank=rank))
            shard = torch.empty(family.local_shape(parameter, config, ShardGrid(tensor=2)))
            for piece in pieces:
                (a, b), (c, d) = piece.local_box
                (e, f), (g, h) = piece.hf_box
                shard[a:b, c:d] = whole[piece.hf_name][e:f, g:h]
            order = sorted(pieces, key=lambda piece: (piece.hf_name, piece.hf_box))
            plan = plan_pack([Piece(p.hf_name, shapes[p.hf_name], p.hf_box, p.local_box) for p in order])
            into, scales = torch.zeros(plan.bytes, dtype=torch.uint8), torch.zeros(plan.scales)
            pack(shard, plan, into, scales)
            for piece, offset, scale in zip(plan.pieces, plan.offsets, plan.scale_offsets, strict=True):
                numbers, of_blocks = quantize(whole[piece.name])
                (a, b), (c, d) = piece.box
                packed = into[offset : offset + piece.rows * piece.columns]
                assert torch.equal(packed, numbers[a:b, c:d].flatten().view(torch.uint8))
                wanted = of_blocks[a // BLOCK : -(-b // BLOCK), c // BLOCK : -(-d // BLOCK)].flatten()
                assert torch.equal(scales[scale : scale + wanted.numel()], wanted)


@pytest.mark.parametrize("region", [((64, 128), (0, 128)), ((0, 100), (0, 128)), ((0, 256), (0, 64))])
def test_a_cut_block_is_refused(region):
    shape = (256, 128)
    local = tuple((0, stop - start) for start, stop in region)
    with pytest.raises(NotAligned, match="gather the tensor"):
        plan_pack([Piece("w", shape, region, local)])


def test_a_last_block_may_be_short():
    plan = plan_pack([Piece("w", (200, 130), ((128, 200), (0, 130)), ((0, 72), (0, 130)))])
    assert plan.scales == 2 and plan.bytes == 9360 and plan.table()[:, 2:4].tolist() == [[72, 128], [72, 2]]


def lines(plan: PackPlan) -> list[tuple[int, ...]]:
    """A plan's table, block after block."""
    made = []
    for piece, offset, scale in zip(plan.pieces, plan.offsets, plan.scale_offsets, strict=True):
        (top, bottom), (left, right) = piece.local_box
        for row in range(0, bottom - top, BLOCK):
            for column in range(0, right - left, BLOCK):
                extent = min(BLOCK, bottom - top - row), min(BLOCK, right - left - column)
                made.append((top + row, left + column, *extent, offset + row * piece.columns + column, piece.columns, scale))
                scale += 1
    return made


def test_a_table_has_a_line_for_each_block():
    shapes = [((300, 257), (40, 16)), ((128, 128), (0, 0)), ((1, 129), (7, 3))]
    boxes = [
        Piece(f"w{at}", (rows, columns), ((0, rows), (0, columns)), ((top, top + rows), (left, left + columns)))
        for at, ((rows, columns), (top, left)) in enumerate(shapes)
    ]
    plan = plan_pack(boxes)
    assert plan.table().dtype == "int64" and list(map(tuple, plan.table().tolist())) == lines(plan)
    assert len(lines(plan)) == plan.scales == 12 and not plan.in_vectors and plan_pack(boxes[1:2]).in_vectors
    assert plan_pack([]).table().shape == (0, 7)


def kept() -> list[bool]:
    """Whether a plan's table stays from update to update, and one is made for each shape that is quantized whole."""
    from tulu_mega.bridge import fp8

    found, built = [], []
    table = PackPlan.table
    PackPlan.table = lambda self: built.append(self) or table(self)
    whole = ((0, 256), (0, 128))
    plan = plan_pack([Piece("w", (256, 128), whole, whole)])
    for scale in (1.0, 2.0):
        message = fp8.packed(torch.full((256, 128), 448 * scale), plan, "triton")
        found.append(message[plan.bytes :].view(torch.float32).tolist() == [scale] * 2)
    found.append(built == [plan])
    numbers, scales = torch.empty(256, 128, dtype=torch.float8_e4m3fn), torch.empty(2, 1)
    for _ in range(3):
        fp8.quantize_whole(torch.ones(256, 128), numbers, scales)
    return [*found, fp8._whole(256, 128) is fp8._whole(256, 128), bool((numbers.float() == 448).all())]


def test_a_plan_keeps_its_table():
    assert world.run(1, kept)[0] == [True] * 5  # new numbers each time, one table


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_on_a_gpu(backend):
    """The same bits as on a CPU: blocks of zeros, the smallest numbers of E4M3 and float32, edges, NaN, both kinds of weights."""
    for given_ in (weights, broken):
        for ours, theirs in zip(packed(backend, "cuda", given_), packed("torch", "cpu", given_), strict=True):
            assert alike(ours, theirs)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_compiled_for_an_h100(kind):
    from tulu_kernels.fp8_blocks import blocks

    made = compiled(
        blocks._pack,
        {"weight": f"*{kind}", "table": "*i64", "into": "*u8", "scales": "*fp32", "stride": "i32"},
        dict(LEAST=blocks.LEAST, LARGEST=blocks.LARGEST, ALIGNED=True, INTEGER=False, BLOCK=BLOCK),
        blocks._WARPS,
    )
    assert made.stack == 0 and "ld.global.v4.b32" in made.loads and "st.global.v4.b32" in made.stores, made
