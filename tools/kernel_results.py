"""Results of the kernels on odd shapes, against torch in float64: the part `correct` of bench_kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from kernel_inputs import draw_shard, draw_tokens, layer_boxes, policy_step
from measuring import Bench, Figures
from torch import Tensor
from tulu_kernels.buckets import BoxCopies
from tulu_kernels.fp8_blocks import pack
from tulu_kernels.linear_logprob import linear_logprob

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest relative error: of float32, sums in another order; of bf16, logits of 8 bits, which the reference is given too."""


def correct(bench: Bench) -> Figures:
    """On odd shapes, against torch in float64."""
    before, good = len(bench.failed), True
    checks: dict[str, Callable[[], dict[str, float | bool]]] = {
        "logprob float32": partial(_logprob_errors, bench, torch.float32),
        "logprob bfloat16": partial(_logprob_errors, bench, torch.bfloat16),
        "fp8": partial(_fp8_bits, bench),
        "buckets": partial(_bucket_bits, bench),
        "policy": partial(_policy_errors, bench),
    }
    for check, compare in checks.items():
        bound = BOUNDS[torch.bfloat16 if "bfloat16" in check else torch.float32]
        for key, error in bench.attempt(check, compare).items():
            yield f"{check} {key}", error
            if key != "failed":
                good &= error if isinstance(error, bool) else error < bound
    yield "ok", bool(good and len(bench.failed) == before)


def _fp8_bits(bench: Bench) -> dict[str, bool]:
    weight, plan = draw_shard(bench, small=True)
    packed = []
    for backend in ("triton", "torch"):
        into = torch.zeros(plan.bytes, dtype=torch.uint8, device=bench.device)
        scales = torch.zeros(plan.scales, device=bench.device)
        pack(weight, plan, into, scales, backend=backend)
        packed.append((into, scales))
    return {"same bits": all(torch.equal(*pair) for pair in zip(*packed, strict=True))}


def _bucket_bits(bench: Bench) -> dict[str, bool]:
    sources, targets, bucket = layer_boxes(bench)
    BoxCopies("triton")(sources, targets)
    by_kernel = bucket.clone()
    BoxCopies("torch")(sources, targets)
    return {"same bits": torch.equal(by_kernel, bucket)}


def _policy_errors(bench: Bench) -> dict[str, float]:
    tokens = draw_tokens(bench, 1031, 7)
    sides = zip(policy_step(tokens, "triton"), policy_step(tokens, "torch"), strict=True)
    return {key: _relative(*pair) for key, pair in zip(("loss", "gradient"), sides, strict=True)}


def _logprob_errors(bench: Bench, dtype: torch.dtype) -> dict[str, float]:
    rows, hidden_size, vocabulary, columns = 77, 256, 1031, 1013
    hidden = bench.random(rows, hidden_size, dtype=dtype, seed=1).requires_grad_()
    weight = (bench.random(vocabulary, hidden_size, seed=2) / 16).to(dtype).requires_grad_()
    labels = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(3)).to(bench.device)
    up, up_entropy = bench.random(rows, seed=4), bench.random(rows, seed=5)
    buffer = torch.zeros(weight.shape, device=bench.device)

    def ours(into: Tensor | None) -> list[Tensor]:
        values = linear_logprob(
            hidden, weight, labels, columns=columns, temperature=0.7, entropy=True, workspace=dtype.itemsize * columns * 32,
            gradient_buffer=lambda _weight: into, backend="triton",
        )  # fmt: skip
        return [*values, *torch.autograd.grad(values, (hidden, weight), (up, up_entropy))]

    got = ours(None)
    ours(buffer)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    logits = wide[0] @ wide[1][:columns].t()
    if dtype == torch.bfloat16:  # what the kernel is given
        logits = logits + (logits.to(dtype).double() - logits).detach()
    logs = (logits / 0.7).log_softmax(-1)
    wanted_logp, wanted_entropy = logs.gather(1, labels[:, None]).squeeze(1), -(logs.exp() * logs).sum(-1)
    gradients = torch.autograd.grad((wanted_logp, wanted_entropy), wide, (up.double(), up_entropy.double()))
    wanted = [wanted_logp, wanted_entropy, *gradients, gradients[1]]
    names = ("logp", "entropy", "d hidden", "d weight", "d weight in float32")
    return {name: _relative(mine, truth) for name, mine, truth in zip(names, [*got, buffer], wanted, strict=True)}


def _relative(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest entry."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max() / wanted.abs().max())
