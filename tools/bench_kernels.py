"""Holds the kernels of `kernels/tulu_kernels` against torch on one device: results, time, and capture in CUDA graphs.

    python3 tools/bench_kernels.py                                   on a CUDA device (says so, and no more, where there is none)
    python3 tools/bench_kernels.py --rows 8192 16384 --only logprob
    TRITON_INTERPRET=1 python3 tools/bench_kernels.py --device cpu   small shapes, to see that it works

Needs torch and Triton; nothing has to be installed, the repository is put on the path. Liger's fused cross-entropy takes part
where it can be imported. Prints a table, then one JSON line:

    correct    largest errors against torch in float64, by kernel and type; `ok` whether all are within their bounds, and packs of
               FP8 blocks and buckets the reference's bits
    logprob    by rows: milliseconds forward and backward of ours, of its matrix products alone (`products`: those that it makes,
               logits that are made twice included), of full logits, of those compiled, of Liger; memory at the peak beyond
               what stood before; `of_products` products over ours (0.85 wanted)
    fp8        GB/s read and written while a shard is packed, of a copy of as much, and the first over the second (0.7 wanted)
    fp8_products  a layer's widest product in bf16, and as FP8 training computes it, by torch's scaled products: milliseconds,
               TFLOP/s, and relative errors (root mean square): `error` of the float32 product of what was there before it was
               quantized, `arithmetic` of that of the quantized numbers themselves
    policy     microseconds of the policy loss forward and backward, by kernel and by torch
    buckets    milliseconds to fill a bucket with a layer's boxes, by kernel and a copy each
    graphs     whether each can be captured in a CUDA graph and gives the same bits replayed; what was refused, where not

Exit status 1 when something is not correct.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.errors import TritonError
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from tulu_kernels.buckets import BoxCopies, plan_bucket
from tulu_kernels.fp8_blocks import BLOCK, Box, PackPlan, pack, plan_pack, quantize
from tulu_kernels.fp8_blocks.reference import LARGEST, dequantize
from tulu_kernels.linear_logprob import WORKSPACE, linear_logprob
from tulu_kernels.linear_logprob.function import even_chunks
from tulu_kernels.linear_logprob.rows import BYTES
from tulu_kernels.policy_loss import PolicyLoss, Tokens, policy_loss

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest relative error: of float32, sums in another order; of bf16, logits of 8 bits, which the reference is given too."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--only", nargs="+", choices=("logprob", *PARTS), default=[*PARTS, "logprob"])
    parser.add_argument("--rows", nargs="+", type=int, help="of the log-probabilities; 8192 16384, on a CPU 96")
    parser.add_argument("--hidden", type=int, help="4096, on a CPU 256")
    parser.add_argument("--vocabulary", type=int, help="128256, on a CPU 1000")
    parser.add_argument("--workspace", type=int, default=WORKSPACE, help="bytes of logits made at a time")
    options = parser.parse_args()
    if options.device is None and not torch.cuda.is_available():
        print(json.dumps({"bench": "kernels", "not_run": "torch sees no CUDA device"}))
        return 0
    on_gpu = options.device != "cpu"
    if on_gpu and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; run this on a GPU machine or with --device cpu")
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("Triton's kernels run on a CPU in its interpreter only; set TRITON_INTERPRET=1")
    rows = options.rows or ([8192, 16384] if on_gpu else [96])
    hidden, vocabulary = options.hidden or (4096 if on_gpu else 256), options.vocabulary or (128256 if on_gpu else 1000)
    bench = Bench(torch.device("cuda" if on_gpu else "cpu"))
    report: dict[str, Any] = {"bench": "kernels", **bench.machine(), "hidden": hidden, "vocabulary": vocabulary}
    for part in options.only:
        if part == "logprob":
            report[part] = {count: logprob(bench, count, hidden, vocabulary, options.workspace) for count in rows}
        else:
            report[part] = PARTS[part](bench)
        table(part, report[part])
    print(json.dumps(report))
    return int(not report.get("correct", {"ok": True})["ok"])


class Bench:
    """A device, and how time and memory are taken there."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"

    def machine(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else platform.processor() or "cpu"
        return {"device": name, "python": platform.python_version(), "torch": torch.__version__}

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)

    def milliseconds(self, action: Callable[[], Any]) -> float:
        """Median of a second of runs, each reading from memory and not from a cache; on a CPU the best of three."""
        if self.on_gpu:
            return round(do_bench(action, warmup=200, rep=1000, return_mode="median"), 4)
        action()
        return round(1e3 * min(timeit.repeat(action, number=1, repeat=3)), 4)

    def peak(self, action: Callable[[], Any]) -> int | None:
        """Bytes beyond what was there before; on a GPU alone."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


# Log-probabilities


def logprob(bench: Bench, rows: int, hidden_size: int, vocabulary: int, workspace: int) -> dict[str, Any]:
    """bf16, into a float32 gradient buffer, as a last pipeline stage runs it."""
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    hidden = bench.random(rows, hidden_size, dtype=dtype, seed=1).requires_grad_()
    weight = (bench.random(vocabulary, hidden_size, seed=2) / hidden_size**0.5).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (rows,), device=bench.device)
    buffer = torch.zeros(weight.shape, dtype=torch.float32, device=bench.device)
    upstream = bench.random(rows, seed=3)

    def ours() -> None:
        logp, _ = linear_logprob(
            hidden, weight, labels, columns=vocabulary, workspace=workspace, gradient_buffer=lambda _weight: buffer,
            backend="triton",
        )  # fmt: skip
        logp.backward(upstream)
        hidden.grad = weight.grad = None

    def full(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        (-loss(hidden, weight, labels)).backward(upstream)
        buffer.add_(weight.grad)
        hidden.grad = weight.grad = None

    chunks = list(even_chunks(rows, max(1, workspace // (BYTES * vocabulary))))
    logits = torch.empty(chunks[0].stop, vocabulary, dtype=dtype, device=bench.device)

    def products() -> None:
        with torch.no_grad():
            for number, here in enumerate(chunks):
                part = logits[: here.stop - here.start]
                for _ in range(1 if number == len(chunks) - 1 else 2):  # the last chunk's are kept
                    torch.mm(hidden[here], weight.t(), out=part)
                torch.mm(part, weight)
                torch.mm(part.t(), hidden[here])

    sides: dict[str, Callable[[], None]] = {"ours": ours, "products": products, "full": lambda: full(_full_loss)}
    compiled = torch.compile(_full_loss)
    sides["compiled"] = lambda: full(compiled)
    with contextlib.suppress(ImportError):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        def liger() -> None:  # its loss is a sum: the same upstream for every row
            Liger.apply(hidden, weight, labels)[0].backward()
            buffer.add_(weight.grad)
            hidden.grad = weight.grad = None

        sides["liger"] = liger
    found: dict[str, Any] = {"chunks": len(chunks)}
    for name, side in sides.items():
        try:
            found[name] = {"milliseconds": bench.milliseconds(side), "peak": bench.peak(side)}
        except (RuntimeError, TritonError) as error:  # a peer that runs out of memory or cannot be compiled is no end of ours
            if name in ("ours", "products"):
                raise
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        hidden.grad = weight.grad = None
    found["of_products"] = round(found["products"]["milliseconds"] / found["ours"]["milliseconds"], 3)
    flops = 2 * rows * vocabulary * hidden_size * (4 - 1 / len(chunks))
    found["tflops"] = round(flops / found["ours"]["milliseconds"] / 1e9, 1)
    return found


def _full_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")


# FP8 blocks, policy loss, buckets


def _shard(bench: Bench, small: bool) -> tuple[Tensor, PackPlan]:
    """A quarter of Llama 3.1 8B's gate and up, as megatron-core fuses them: two boxes."""
    rows, columns = (256, 384) if small else (3584, 4096)
    weight = bench.random(2 * rows, columns, dtype=torch.bfloat16, seed=4)
    boxes = [
        Box(name, (4 * rows, columns), ((0, rows), (0, columns)), ((at, at + rows), (0, columns)))
        for name, at in (("gate", 0), ("up", rows))
    ]
    return weight, plan_pack(boxes)


def fp8(bench: Bench) -> dict[str, Any]:
    weight, plan = _shard(bench, small=not bench.on_gpu)
    into = torch.empty(plan.bytes, dtype=torch.uint8, device=bench.device)
    scales = torch.empty(plan.scales, device=bench.device)
    moved = weight.nbytes + plan.bytes + scales.nbytes
    source = torch.empty(moved // 2, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    rates = {
        "gigabytes_per_second": moved / bench.milliseconds(lambda: pack(weight, plan, into, scales, backend="triton")) / 1e6,
        "copy": 2 * source.nbytes / bench.milliseconds(lambda: target.copy_(source)) / 1e6,
    }
    return {name: round(rate, 1) for name, rate in rates.items()} | {
        "of_copy": round(rates["gigabytes_per_second"] / rates["copy"], 3)
    }


def fp8_products(bench: Bench) -> dict[str, Any]:
    """Gate and up of Llama 3.1 8B forward. Activations in blocks of 1 x 128 and weights of 128 x 128 are `precision.fp8 =
    "blockwise"`, one scale a tensor is `"tensorwise"`; gradients are E5M2 there (`tensorwise_gradient`)."""
    rows, inputs, outputs = (8192, 4096, 28672) if bench.on_gpu else (256, 256, 384)
    x = bench.random(rows, inputs, dtype=torch.bfloat16, seed=16)
    weight = (bench.random(outputs, inputs, seed=17) / inputs**0.5).bfloat16()
    exact = x.float() @ weight.float().t()

    def one_scale(values: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = values.abs().max().float() / torch.finfo(kind).max
        return (values / scale).to(kind), scale

    def tensorwise(kind: torch.dtype) -> tuple[Callable[[], Tensor], Tensor]:
        (left, left_scale), (right, right_scale) = one_scale(x, kind), one_scale(weight, torch.float8_e4m3fn)
        return (
            lambda: torch._scaled_mm(left, right.t(), left_scale, right_scale, out_dtype=torch.bfloat16),
            (left.float() * left_scale) @ (right.float() * right_scale).t(),
        )

    def blockwise() -> tuple[Callable[[], Tensor], Tensor]:
        blocks = x.float().view(rows, -1, BLOCK)
        left_scales = blocks.abs().amax(-1) / LARGEST
        left = (blocks / left_scales[:, :, None]).to(torch.float8_e4m3fn).view(rows, inputs)
        right, right_scales = quantize(weight)
        truth = (left.float() * left_scales.repeat_interleave(BLOCK, 1)) @ dequantize(right, right_scales).t()
        # cuBLAS: scales of activations column by column, of weights in rows of multiples of four
        by_column = left_scales.t().contiguous().t()
        wide = F.pad(right_scales, (0, -right_scales.shape[1] % 4))
        kinds = F.ScalingType
        return (
            lambda: F.scaled_mm(
                left, right.t(), by_column, kinds.BlockWise1x128, wide.t(), kinds.BlockWise128x128, output_dtype=torch.bfloat16
            ),
            truth,
        )  # fmt: skip

    sides: dict[str, Callable[[], tuple[Callable[[], Tensor], Tensor]]] = {
        "bf16": lambda: (lambda: x @ weight.t(), exact),
        "tensorwise": lambda: tensorwise(torch.float8_e4m3fn),
        "tensorwise_gradient": lambda: tensorwise(torch.float8_e5m2),
        "blockwise": blockwise,
    }
    found: dict[str, Any] = {}
    for name, side in sides.items():
        try:
            product, of_numbers = side()
            got, milliseconds = product().float(), bench.milliseconds(product)
        except (RuntimeError, ValueError, AttributeError) as error:  # this torch or device has no such product
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:120]}"}
            continue
        found[name] = {
            "milliseconds": milliseconds,
            "tflops": round(2 * rows * inputs * outputs / milliseconds / 1e9, 1),
            "error": round(_rms(got - exact) / _rms(exact), 6),
            "arithmetic": round(_rms(got - of_numbers) / _rms(of_numbers), 6),
        }
    return found


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _tokens(bench: Bench, count: int, responses: int) -> Tokens:
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


_LOSS = PolicyLoss(
    "grpo", clip_low=0.2, clip_high=0.28, aggregation="sequence", max_tokens=4096, beta=0.05, importance="token"
)


def _policy_step(tokens: Tokens, backend: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    loss = policy_loss(_LOSS, tokens, backend=backend).loss_sum
    (gradient,) = torch.autograd.grad(loss, tokens.logp_T)
    return loss.detach(), gradient


def policy(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for count in (8192, 65536) if bench.on_gpu else (1024,):
        tokens = _tokens(bench, count, count // 512)
        times = {name: 1e3 * bench.milliseconds(partial(_policy_step, tokens, name)) for name in ("triton", "torch")}
        found[str(count)] = {name: round(value, 1) for name, value in times.items()}
        found[str(count)]["of_torch"] = round(times["triton"] / times["torch"], 3)
    return found


def _layer_boxes(bench: Bench) -> tuple[list[Tensor], list[Tensor], Tensor]:
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


def buckets(bench: Bench) -> dict[str, Any]:
    sources, targets, bucket = _layer_boxes(bench)
    together, each = BoxCopies("triton"), BoxCopies("torch")
    times = {
        "triton": bench.milliseconds(lambda: together(sources, targets)),
        "copies": bench.milliseconds(lambda: each(sources, targets)),
    }
    return {
        **times, "boxes": len(sources), "bytes": bucket.nbytes, "of_copies": round(times["triton"] / times["copies"], 3)
    }  # fmt: skip


# Results


def correct(bench: Bench) -> dict[str, Any]:
    """On odd shapes, against torch in float64."""
    errors: dict[str, float | bool] = {}
    good = True
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for key, error in _logprob_errors(bench, dtype).items():
            errors[f"logprob {name} {key}"] = error
            good &= error < BOUNDS[dtype]
    weight, plan = _shard(bench, small=True)
    packed = []
    for backend in ("triton", "torch"):
        into = torch.zeros(plan.bytes, dtype=torch.uint8, device=bench.device)
        scales = torch.zeros(plan.scales, device=bench.device)
        pack(weight, plan, into, scales, backend=backend)
        packed.append((into, scales))
    errors["fp8 same bits"] = all(torch.equal(*pair) for pair in zip(*packed, strict=True))
    sources, targets, bucket = _layer_boxes(bench)
    BoxCopies("triton")(sources, targets)
    by_kernel = bucket.clone()
    BoxCopies("torch")(sources, targets)
    errors["buckets same bits"] = torch.equal(by_kernel, bucket)
    tokens = _tokens(bench, 1031, 7)
    for key, got, wanted in zip(("loss", "gradient"), _policy_step(tokens, "triton"), _policy_step(tokens, "torch"), strict=True):
        errors[f"policy {key}"] = _relative(got, wanted)
        good &= errors[f"policy {key}"] < BOUNDS[torch.float32]
    return {"ok": bool(good and errors["fp8 same bits"] and errors["buckets same bits"]), **errors}


def _logprob_errors(bench: Bench, dtype: torch.dtype) -> dict[str, float]:
    rows, hidden_size, vocabulary, columns = 77, 256, 1031, 1013
    hidden = bench.random(rows, hidden_size, dtype=dtype, seed=1).requires_grad_()
    weight = (bench.random(vocabulary, hidden_size, seed=2) / 16).to(dtype).requires_grad_()
    labels = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(3)).to(bench.device)
    up, up_entropy = bench.random(rows, seed=4), bench.random(rows, seed=5)
    logp, entropy = linear_logprob(
        hidden, weight, labels, columns=columns, temperature=0.7, entropy=True, workspace=dtype.itemsize * columns * 32,
        backend="triton",
    )  # fmt: skip
    got = [logp, entropy, *torch.autograd.grad((logp, entropy), (hidden, weight), (up, up_entropy))]
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    logits = wide[0] @ wide[1][:columns].t()
    if dtype == torch.bfloat16:  # what the kernel is given
        logits = logits + (logits.to(dtype).double() - logits).detach()
    logs = (logits / 0.7).log_softmax(-1)
    wanted_logp, wanted_entropy = logs.gather(1, labels[:, None]).squeeze(1), -(logs.exp() * logs).sum(-1)
    gradients = torch.autograd.grad((wanted_logp, wanted_entropy), wide, (up.double(), up_entropy.double()))
    wanted = [wanted_logp, wanted_entropy, *gradients]
    names = ("logp", "entropy", "d hidden", "d weight")
    return {name: _relative(mine, truth) for name, mine, truth in zip(names, got, wanted, strict=True)}


def _relative(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest entry."""
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


# CUDA graphs


def graphs(bench: Bench) -> dict[str, Any]:
    if not bench.on_gpu:
        return {"not run": "there are none on a CPU"}
    hidden = bench.random(512, 256, dtype=torch.bfloat16, seed=1).requires_grad_()
    weight = bench.random(1024, 256, dtype=torch.bfloat16, seed=2).requires_grad_()
    labels = torch.randint(1024, (512,), device=bench.device)

    def of_logprob() -> list[Tensor]:
        logp, _ = linear_logprob(hidden, weight, labels, columns=1024, workspace=2**18, backend="triton")
        return [logp, *torch.autograd.grad(logp.sum(), (hidden, weight))]

    shard, plan = _shard(bench, small=True)
    into, scales = torch.zeros(plan.bytes, dtype=torch.uint8, device=bench.device), torch.zeros(plan.scales, device=bench.device)
    tokens = _tokens(bench, 4096, 16)
    sources, targets, bucket = _layer_boxes(bench)
    copies = BoxCopies("triton")

    def of_fp8() -> list[Tensor]:
        pack(shard, plan, into, scales, backend="triton")
        return [into, scales]

    def of_buckets() -> list[Tensor]:
        copies(sources, targets)
        return [bucket]

    def of_policy() -> list[Tensor]:
        return list(_policy_step(tokens, "triton"))

    actions = {"logprob": of_logprob, "fp8": of_fp8, "policy": of_policy, "buckets": of_buckets}
    return {name: _captured(action) for name, action in actions.items()}


def _captured(action: Callable[[], list[Tensor]]) -> bool | str:
    """Whether a replay gives the bits of a plain run; what was refused where it cannot be captured."""
    side = torch.cuda.Stream()
    try:
        with torch.cuda.stream(side):
            action(), action()
        torch.cuda.synchronize()
        wanted = [each.clone() for each in action()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = action()
        for each in held:
            each.detach().zero_()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return all(torch.equal(mine, truth) for mine, truth in zip(held, wanted, strict=True))


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "correct": correct, "fp8": fp8, "fp8_products": fp8_products, "policy": policy, "buckets": buckets, "graphs": graphs
}  # fmt: skip
"""All but the log-probabilities, which have sizes."""


def table(part: str, found: dict[str, Any]) -> None:
    """A line for every figure."""
    print(f"== {part}")
    for name, value in found.items():
        if not isinstance(value, dict):
            value = {"": value}
        for key, figure in value.items():
            print(f"{name!s:>24} {key:<16} {figure}")


if __name__ == "__main__":
    sys.exit(main())
