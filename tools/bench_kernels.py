"""Holds the kernels of `kernels/tulu_kernels` against torch on one device: results, time, and capture in CUDA graphs.

    python3 tools/bench_kernels.py                                   on a CUDA device (says so, and no more, where there is none)
    python3 tools/bench_kernels.py --rows 8192 16384 --only logprob
    TRITON_INTERPRET=1 python3 tools/bench_kernels.py --device cpu   small shapes, to see that it works

Needs torch and Triton; nothing has to be installed, the repository is put on the path. Liger's fused cross-entropy takes part
where it can be imported. Prints every figure as soon as it is there, and at the end one JSON line; after a failure or a time-out
(an interrupt, or a signal to end) with what was measured until then:

    correct    largest errors against torch in float64, by kernel and type; `ok` whether all are within their bounds, and packs of
               FP8 blocks and buckets the reference's bits
    logprob    by rows: milliseconds forward and backward of ours, of its matrix products alone (`products`: those that it makes,
               logits that are made twice and the one into the float32 buffer included), of full logits, of those compiled for
               this number of rows, of Liger; memory at the peak beyond what stood before; `of_products` products over ours
               (0.85 wanted)
    fp8        GB/s read and written while a shard is packed, of a copy of as much, and the first over the second (0.7 wanted)
    fp8_products  a layer's widest product in bf16, and as FP8 training computes it, by torch's scaled products: milliseconds,
               TFLOP/s, and relative errors (root mean square): `error` of the float32 product of what was there before it was
               quantized, `arithmetic` of that of the quantized numbers themselves
    policy     microseconds of the policy loss forward and backward, by kernel and by torch, with the host's time for launches,
               and on a GPU `replayed` from a CUDA graph, without it
    buckets    milliseconds to fill a bucket with a layer's boxes, by kernel and a copy each
    graphs     whether each can be captured in a CUDA graph and gives the same bits replayed; what was refused, where not
    failed     what raised an error, peers' excepted: such a part's figure is the error, and the others go on

Exit status 1 when something is not correct or failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from kernel_inputs import draw_shard, draw_tokens, layer_boxes, policy_step
from kernel_results import correct
from measuring import Bench, Figures
from tulu_kernels.buckets import BoxCopies
from tulu_kernels.fp8_blocks import BLOCK, pack, quantize
from tulu_kernels.fp8_blocks.reference import LARGEST, dequantize
from tulu_kernels.linear_logprob import WORKSPACE, linear_logprob
from tulu_kernels.linear_logprob.function import even_chunks
from tulu_kernels.linear_logprob.rows import BYTES
from tulu_kernels.weight_gradient import add_product


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
    torch.set_float32_matmul_precision("highest")  # some images allow TF32, and float32 is what results are held against
    bench = Bench(torch.device("cuda" if on_gpu else "cpu"))
    report: dict[str, Any] = {"bench": "kernels", **bench.machine(), "hidden": hidden, "vocabulary": vocabulary}
    report["failed"] = bench.failed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: told to end"))
    try:
        for part in options.only:
            into = report[part] = {}
            if part != "logprob":
                bench.measure(part, PARTS[part](bench), into)
                continue
            for count in rows:
                figures = logprob(bench, count, hidden, vocabulary, options.workspace)
                bench.measure(f"{part} {count}", figures, into.setdefault(count, {}))
    finally:
        print(json.dumps(report), flush=True)
    return int(bool(bench.failed) or not report.get("correct", {"ok": True}).get("ok", False))


# Log-probabilities


def logprob(bench: Bench, rows: int, hidden_size: int, vocabulary: int, workspace: int) -> Figures:
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
                add_product(buffer, part, hidden[here])

    sides: dict[str, Callable[[], None]] = {"ours": ours, "products": products, "full": lambda: full(_full_loss)}
    # else the second number of rows would be compiled for all numbers
    compiled = torch.compile(_full_loss, dynamic=False)
    sides["compiled"] = lambda: full(compiled)
    with contextlib.suppress(ImportError):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        def liger() -> None:  # its loss is a sum: the same upstream for every row
            Liger.apply(hidden, weight, labels)[0].backward()
            buffer.add_(weight.grad)
            hidden.grad = weight.grad = None

        sides["liger"] = liger
    yield "chunks", len(chunks)
    taken = {}
    for name, side in sides.items():
        measured = partial(lambda side: {"milliseconds": bench.milliseconds(side), "peak": bench.peak(side)}, side)
        taken[name] = bench.attempt(f"logprob {rows} {name}", measured, peer=name not in ("ours", "products"))
        yield name, taken[name]
        hidden.grad = weight.grad = None
    if "failed" in taken["ours"] | taken["products"]:
        return
    yield "of_products", round(taken["products"]["milliseconds"] / taken["ours"]["milliseconds"], 3)
    flops = 2 * rows * vocabulary * hidden_size * (4 - 1 / len(chunks))
    yield "tflops", round(flops / taken["ours"]["milliseconds"] / 1e9, 1)


def _full_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")


# FP8 blocks, policy loss, buckets


def fp8(bench: Bench) -> Figures:
    weight, plan = draw_shard(bench, small=not bench.on_gpu)
    into = torch.empty(plan.bytes, dtype=torch.uint8, device=bench.device)
    scales = torch.empty(plan.scales, device=bench.device)
    moved = weight.nbytes + plan.bytes + scales.nbytes
    source = torch.empty(moved // 2, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    rate = moved / bench.milliseconds(lambda: pack(weight, plan, into, scales, backend="triton")) / 1e6
    yield "gigabytes_per_second", round(rate, 1)
    copy = 2 * source.nbytes / bench.milliseconds(lambda: target.copy_(source)) / 1e6
    yield "copy", round(copy, 1)
    yield "of_copy", round(rate / copy, 3)


def fp8_products(bench: Bench) -> Figures:
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

    def measured(side: Callable[[], tuple[Callable[[], Tensor], Tensor]]) -> dict[str, float]:
        product, of_numbers = side()
        got, milliseconds = product().float(), bench.milliseconds(product)
        return {
            "milliseconds": milliseconds,
            "tflops": round(2 * rows * inputs * outputs / milliseconds / 1e9, 1),
            "error": round(_rms(got - exact) / _rms(exact), 6),
            "arithmetic": round(_rms(got - of_numbers) / _rms(of_numbers), 6),
        }

    for name, side in sides.items():  # of FP8 this torch or device may have no such product
        yield name, bench.attempt(f"fp8_products {name}", partial(measured, side), peer=name != "bf16")


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def policy(bench: Bench) -> Figures:
    for count in (8192, 65536) if bench.on_gpu else (1024,):
        tokens, times = draw_tokens(bench, count, count // 512), {}
        for name in ("triton", "torch"):
            step = partial(policy_step, tokens, name)
            times[name] = 1e3 * bench.milliseconds(step)
            if bench.on_gpu:
                replayed = bench.attempt(f"policy {name} replayed", partial(_replayed, bench, step), peer=name == "torch")
                times[f"{name} replayed"] = replayed
        found = {name: round(value, 1) if isinstance(value, float) else value for name, value in times.items()}
        for kind in ("", " replayed"):
            mine, theirs = times.get(f"triton{kind}"), times.get(f"torch{kind}")
            if isinstance(mine, float) and isinstance(theirs, float):
                found[f"of_torch{kind}"] = round(mine / theirs, 3)
        yield str(count), found


def _replayed(bench: Bench, action: Callable[[], Any]) -> float:
    """Microseconds of an action in a CUDA graph."""
    graph, _held = bench.captured(action)
    return 1e3 * bench.milliseconds(graph.replay)


def buckets(bench: Bench) -> Figures:
    sources, targets, bucket = layer_boxes(bench)
    yield "boxes", len(sources)
    yield "bytes", bucket.nbytes
    together, each = BoxCopies("triton"), BoxCopies("torch")
    yield "triton", (ours := bench.milliseconds(lambda: together(sources, targets)))
    yield "copies", (theirs := bench.milliseconds(lambda: each(sources, targets)))
    yield "of_copies", round(ours / theirs, 3)


# CUDA graphs


def graphs(bench: Bench) -> Figures:
    if not bench.on_gpu:
        yield "not run", "there are none on a CPU"
        return
    hidden = bench.random(512, 256, dtype=torch.bfloat16, seed=1).requires_grad_()
    weight = bench.random(1024, 256, dtype=torch.bfloat16, seed=2).requires_grad_()
    labels = torch.randint(1024, (512,), device=bench.device)

    def of_logprob() -> list[Tensor]:
        logp, _ = linear_logprob(hidden, weight, labels, columns=1024, workspace=2**18, backend="triton")
        return [logp, *torch.autograd.grad(logp.sum(), (hidden, weight))]

    shard, plan = draw_shard(bench, small=True)
    into, scales = torch.zeros(plan.bytes, dtype=torch.uint8, device=bench.device), torch.zeros(plan.scales, device=bench.device)
    tokens = draw_tokens(bench, 4096, 16)
    sources, targets, bucket = layer_boxes(bench)
    copies = BoxCopies("triton")

    def of_fp8() -> list[Tensor]:
        pack(shard, plan, into, scales, backend="triton")
        return [into, scales]

    def of_buckets() -> list[Tensor]:
        copies(sources, targets)
        return [bucket]

    def of_policy() -> list[Tensor]:
        return list(policy_step(tokens, "triton"))

    actions = {"logprob": of_logprob, "fp8": of_fp8, "policy": of_policy, "buckets": of_buckets}
    for name, action in actions.items():
        same = bench.attempt(f"graphs {name}", partial(_same_replayed, bench, action))
        if same is False:
            bench.failed.append(f"graphs {name}")
        yield name, same


def _same_replayed(bench: Bench, action: Callable[[], list[Tensor]]) -> bool:
    """Whether a replay gives the bits of a plain run."""
    wanted = [each.detach().clone() for each in action()]
    graph, held = bench.captured(action)
    for each in held:
        each.detach().zero_()
    graph.replay()
    return all(torch.equal(mine, truth) for mine, truth in zip(held, wanted, strict=True))


PARTS: dict[str, Callable[[Bench], Figures]] = {
    "correct": correct, "fp8": fp8, "fp8_products": fp8_products, "policy": policy, "buckets": buckets, "graphs": graphs
}  # fmt: skip
"""All but the log-probabilities, which have sizes."""


if __name__ == "__main__":
    sys.exit(main())
