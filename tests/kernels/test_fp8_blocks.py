"""Block-scaled E4M3: our arithmetic against vLLM's, the Triton kernel against ours, both to the bit; plans of shards."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tulu_kernels.fp8_blocks import BLOCK, Box, NotAligned, pack, plan_pack, quantize
from tulu_kernels.fp8_blocks.reference import dequantize

from tests.distributed import world
from tests.kernels.compiled import compiled
from tulu_mega.bridge.families import llama

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


def packed(backend: str):
    """Bytes and scales of every weight, each as two boxes that change places where it has two rows of blocks."""
    made = []
    for weight in weights():
        rows, columns = weight.shape
        middle = BLOCK if rows > BLOCK else rows
        parts = [(0, middle), (middle, rows)][: 1 + (rows > middle)]
        boxes = [Box("w", (rows, columns), ((a, b), (0, columns)), ((a, b), (0, columns))) for a, b in reversed(parts)]
        plan = plan_pack(boxes)
        into, scales = torch.full((plan.bytes,), 7, dtype=torch.uint8), torch.zeros(plan.scales)
        pack(weight, plan, into, scales, backend=backend)
        made.append((into.numpy(), scales.numpy()))
    return made


def test_the_kernel_is_its_reference():
    for (bytes_, scales), (theirs, their_scales) in zip(packed("torch"), world.run(1, packed, "triton")[0], strict=True):
        assert (bytes_ == theirs).all() and (scales == their_scales).all()


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
            pieces = family.pieces(parameter, rank, 2, config)
            shard = torch.empty(family.local_shape(parameter, 2, config))
            for piece in pieces:
                (a, b), (c, d) = piece.local_region
                (e, f), (g, h) = piece.hf_region
                shard[a:b, c:d] = whole[piece.hf_name][e:f, g:h]
            order = sorted(pieces, key=lambda piece: (piece.hf_name, piece.hf_region))
            plan = plan_pack([Box(p.hf_name, shapes[p.hf_name], p.hf_region, p.local_region) for p in order])
            into, scales = torch.zeros(plan.bytes, dtype=torch.uint8), torch.zeros(plan.scales)
            pack(shard, plan, into, scales)
            for box, offset, scale in zip(plan.boxes, plan.offsets, plan.scale_offsets, strict=True):
                numbers, of_blocks = quantize(whole[box.name])
                (a, b), (c, d) = box.region
                assert torch.equal(into[offset : offset + box.rows * box.columns], numbers[a:b, c:d].flatten().view(torch.uint8))
                wanted = of_blocks[a // BLOCK : -(-b // BLOCK), c // BLOCK : -(-d // BLOCK)].flatten()
                assert torch.equal(scales[scale : scale + wanted.numel()], wanted)


@pytest.mark.parametrize("region", [((64, 128), (0, 128)), ((0, 100), (0, 128)), ((0, 256), (0, 64))])
def test_a_cut_block_is_refused(region):
    shape = (256, 128)
    local = tuple((0, stop - start) for start, stop in region)
    with pytest.raises(NotAligned, match="gather the tensor"):
        plan_pack([Box("w", shape, region, local)])


def test_a_last_block_may_be_short():
    plan = plan_pack([Box("w", (200, 130), ((128, 200), (0, 130)), ((0, 72), (0, 130)))])
    assert plan.scales == 2 and plan.bytes == 9360 and [line[2:4] for line in plan.table()] == [(72, 128), (72, 2)]


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
