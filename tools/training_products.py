"""What bench_training.py holds a step against: the matrix products that it is made of."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tulu_mega.model.config import DTYPES
from tulu_mega.plan.model.workload import LABELLED
from tulu_mega.train.engine import Engine


def products(engine: Engine, shape: dict[str, Any], tokens: int) -> dict[str, float]:
    """FLOP/s of a layer's four products and the head's, each forward and both ways backward, as torch has them."""
    device, dtype = engine.platform.device, DTYPES[engine.settings.model.dtype]
    hidden, ffn, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    head = shape.get("head_dim") or hidden // heads
    fused = (heads + 2 * shape["num_key_value_heads"]) * head
    layer = ((hidden, fused), (heads * head, hidden), (hidden, 2 * ffn), (ffn, hidden))
    labelled = round(LABELLED * tokens)

    def seconds(rows: int, inputs: int, outputs: int) -> float:
        x, weight = (torch.randn(*size, device=device, dtype=dtype) for size in ((rows, inputs), (outputs, inputs)))
        upstream = torch.randn(rows, outputs, device=device, dtype=dtype)
        ways: tuple[Callable[[], Tensor], ...] = (lambda: x @ weight.t(), lambda: upstream @ weight, lambda: upstream.t() @ x)
        return sum(map(_seconds, ways))

    layer_flops, layer_seconds = 6.0 * tokens * sum(a * b for a, b in layer), sum(seconds(tokens, *each) for each in layer)
    head_flops = 6.0 * labelled * hidden * shape["vocab_size"]
    head_seconds = seconds(labelled, hidden, shape["vocab_size"])
    layers = shape["num_hidden_layers"]
    return {
        "layer": layer_flops / layer_seconds,
        "head": head_flops / head_seconds,
        "tflops": (layers * layer_flops + head_flops) / (layers * layer_seconds + head_seconds),
    }


def _seconds(action: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(action, warmup=25, rep=100, return_mode="median") / 1e3
    action()
    return min(timeit.repeat(action, number=1, repeat=3))
