"""What only 16 bits have of Transformer Engine: its attention, also over context-parallel ranks, its rotary kernel and FP8."""

from __future__ import annotations

import numpy as np
import pytest

from tests.lib import jobs, layouts, world
from tests.lib.layouts import size
from tests.lib.truths import Truths
from tests.standins.transformer_engine.models import make_model

pytestmark = pytest.mark.ranks

STEPS, LR = 3, 0.02
LAYOUTS = layouts.LAYOUTS | {"CP4": {"context": 4}}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return Truths.of_training(tmp_path_factory, make_model, LR)


def compared(truth, model: str, layout: str, recompute: str, megatron: dict | None = None, precision: dict | None = None):
    """Mean difference of log-probs and ratios of losses and of norms to Hugging Face's, and what each rank tells."""
    directory, _, want = truth(model, "sum", STEPS)
    where = LAYOUTS[layout]
    arguments = (directory, where, 2, "sum", STEPS, LR, None, recompute, "bf16", megatron, precision)
    ranks = world.run(size(where), counted, *arguments)
    logp = {row: values for rank in ranks for row, values in rank["logp"].items()}
    assert logp.keys() == want["logp"].keys()
    differences = np.concatenate([np.subtract(logp[row], values) for row, values in want["logp"].items()])
    losses, norms = (np.divide(ranks[-1][name], want[name]) for name in ("losses", "norms"))
    return np.abs(differences).mean(), losses, norms, ranks


def counted(*arguments):
    """`jobs.engine`, and how often each of the kernels was asked for, products in FP8 by themselves."""
    from collections import Counter

    import transformer_engine_torch as compiled
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage

    calls: Counter[str] = Counter()
    multiply = compiled.generic_gemm

    def product(a, transposed_a, b, *rest, **options):
        calls["FP8" if all(isinstance(each, QuantizedTensorStorage) for each in (a, b)) else "16 bits"] += 1
        return multiply(a, transposed_a, b, *rest, **options)

    compiled.generic_gemm = product

    def counting(name):
        plain = getattr(compiled, name)

        def call(*args, **options):
            calls[name] += 1
            return plain(*args, **options)

        return call

    for name in ("fused_attn_fwd", "fused_attn_bwd", "fused_rope_forward", "fused_rope_backward"):
        setattr(compiled, name, counting(name))
    return jobs.engine(*arguments) | {"calls": dict(calls)}


ATTENTION = [  # model, layout, recompute, megatron
    ("Llama", "TP2xPP2", "full", {"apply_rope_fusion": False}),
    ("Llama tied", "CP2", "none", None),
    ("Qwen 3", "TP2xCP2", "selective", None),
    ("Mistral with windows", "TP2", "none", {"gradient_accumulation_fusion": False}),
]


@pytest.mark.acceptance
@pytest.mark.parametrize("layout", ["CP4", "PP2xCP2", "PP2xVPP2xCP2", "DP2xCP2", "TP2xPP2xCP2"])
@pytest.mark.parametrize("model", ["Llama", "Qwen 2", "OLMo 2"])
def test_attention_over_more_ranks(truth, model, layout):
    test_attention_equals_hugging_face(truth, model, layout, "selective", {"apply_rope_fusion": model == "Llama"})


@pytest.mark.parametrize(("model", "layout", "recompute", "megatron"), ATTENTION)
def test_attention_equals_hugging_face(truth, model, layout, recompute, megatron):
    difference, losses, norms, ranks = compared(truth, model, layout, recompute, megatron)
    assert difference < 0.02
    np.testing.assert_allclose(losses, 1.0, atol=2e-3)
    np.testing.assert_allclose(norms, 1.0, atol=2e-2)
    for rank in ranks:
        assert rank["calls"]["fused_attn_fwd"] > rank["calls"]["fused_attn_bwd"] > 0
        assert (not megatron or megatron.get("apply_rope_fusion", True)) == ("fused_rope_backward" in rank["calls"])


FP8 = [  # recipe, layout, recompute
    ("blockwise", "TP2", "full"),
    ("delayed", "DP2", "full"),
]


@pytest.mark.acceptance
@pytest.mark.parametrize("layout", ["TP2xPP2", "PP2xVPP2", "DP2xTP2", "TP2xCP2", "TP2 without SP"])
@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "delayed"])
def test_fp8_under_more_layouts(truth, recipe, layout):
    test_fp8_stays_near_hugging_face(truth, recipe, layout, "selective")


@pytest.mark.parametrize(("recipe", "layout", "recompute"), FP8)
def test_fp8_stays_near_hugging_face(truth, recipe, layout, recompute):
    difference, losses, norms, ranks = compared(truth, "wide", layout, recompute, precision={"fp8": recipe})
    assert 0.05 < difference < 0.2  # of bf16 it is 0.01
    np.testing.assert_allclose(losses, 1.0, atol=0.03)
    np.testing.assert_allclose(norms, 1.0, atol=0.15)
    for rank in ranks:
        assert rank["losses"] == ranks[0]["losses"]
        assert rank["calls"]["FP8"] and "16 bits" not in rank["calls"]
