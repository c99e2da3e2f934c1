"""What bench_kernels.py gives to kernels: shards, tokens of responses, a layer's boxes. `kernels/` is on the path already."""

from __future__ import annotations

import torch
from measuring import Bench
from torch import Tensor
from tulu_kernels.buckets import plan_bucket
from tulu_kernels.fp8_blocks import PackPlan, Piece, plan_pack
from tulu_kernels.policy_loss import PolicyLoss, Tokens, policy_loss


def draw_shard(bench: Bench, small: bool) -> tuple[Tensor, PackPlan]:
    """A quarter of Llama 3.1 8B's gate and up, as megatron-core fuses them: two boxes."""
    rows, columns = (256, 384) if small else (3584, 4096)
    weight = bench.random(2 * rows, columns, dtype=torch.bfloat16, seed=4)
    boxes = [
        Piece(name, (4 * rows, columns), ((0, rows), (0, columns)), ((at, at + rows), (0, columns)))
        for name, at in (("gate", 0), ("up", rows))
    ]
    return weight, plan_pack(boxes)


def draw_tokens(bench: Bench, count: int, responses: int) -> Tokens:
    segments = torch.arange(count, device=bench.device) * responses // count
    trained = torch.rand(count, generator=torch.Generator().manual_seed(5)).to(bench.device) < 0.9
    logp = -bench.random(count, seed=6).abs()
    near = [logp + 0.05 * bench.random(count, seed=seed) for seed in (7, 8, 9)]
    logp, old, sampler, reference = (each * trained for each in (logp, *near))
    return Tokens(
        logp_T=logp.requires_grad_(), entropy_T=bench.random(count, seed=10).abs(), sampler_logp_T=sampler,
        advantages_T=bench.random(responses, seed=11)[segments], trained_T=trained, segments_T=segments,
        trained_S=torch.zeros(responses, dtype=torch.int64, device=bench.device).index_add(0, segments, trained.long()),
        old_logp_T=old, ref_logp_T=reference,
    )  # fmt: skip


LOSS = PolicyLoss("grpo", clip_low=0.2, clip_high=0.28, aggregation="sequence", max_tokens=4096, beta=0.05, importance="token")


def policy_step(tokens: Tokens, backend: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    loss = policy_loss(LOSS, tokens, backend=backend).loss_sum
    (gradient,) = torch.autograd.grad(loss, tokens.logp_T)
    return loss.detach(), gradient


def layer_boxes(bench: Bench) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """A layer of Llama 3.1 8B in float32, its fused matrices in eight groups of heads, and where they lie in a bf16 bucket."""
    hidden, groups, head = (4096, 8, 128) if bench.on_gpu else (256, 2, 32)
    fused = bench.random(groups * 6 * head, hidden, seed=12)
    sources = []
    for group in range(groups):
        first = group * 6 * head
        sources += [fused[first : first + 4 * head], fused[first + 4 * head : first + 5 * head]]
        sources.append(fused[first + 5 * head : first + 6 * head])
    both = bench.random(7 * hidden, hidden, seed=13)
    sources += [both[: 7 * hidden // 2], both[7 * hidden // 2 :], *(bench.random(hidden, seed=seed) for seed in (14, 15))]
    plan = plan_bucket([each.shape for each in sources], torch.bfloat16)
    bucket = torch.zeros(plan.nbytes, dtype=torch.uint8, device=bench.device)
    return sources, plan.views(bucket), bucket
