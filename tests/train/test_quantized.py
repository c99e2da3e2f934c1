"""Adapters beside quantized frozen weights, against bitsandbytes and PEFT, under layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lib import quantized_jobs, world
from tests.lib.layouts import LAYOUTS, size, weights
from tests.train.test_lora import same
from tulu_mega.bridge import nf4

pytestmark = pytest.mark.ranks

HOW = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}
FEW = [("TP2", False, "none"), ("TP2xPP2", True, "full")]  # layout, scales quantized as well, recompute
GRID = [
    (layout, double, "none")
    for layout in ("TP1", "TP2 without SP", "PP2", "PP2xVPP2", "CP2", "DP2", "TP2xPP2")
    for double in (False, True)
]


def test_blocks_are_bitsandbytes():
    """Numbers and scales to the bit, and what they stand for. Scales of scales are read to the bit, and made nearer than its CPU
    library makes them, which looks a neighbour up in a table."""
    world.run(1, quantized_jobs.compare_blocks)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    root = tmp_path_factory.mktemp("bitsandbytes")
    return root, world.run(1, quantized_jobs.truth, str(root), HOW, True)[0]


@pytest.fixture(scope="module")
def one(truth, tmp_path_factory):
    """The same run on one rank, whose scales are quantized or not."""
    made = {}

    def of(double: bool) -> tuple[Path, dict]:
        if double not in made:
            out = tmp_path_factory.mktemp("one")
            made[double] = out, run(truth[0], out, "TP1", double)[0]
        return made[double]

    return of


def run(root: Path, out: Path, layout: str, double: bool, recompute: str = "none") -> list[dict]:
    lora = {"adapter": str(root / "adapter"), "base_precision": "nf4", "double_quantization": double}
    arguments = (str(root / "model"), LAYOUTS[layout], lora, str(out), recompute)
    return world.run(size(LAYOUTS[layout]), quantized_jobs.trained, *arguments)


def check(truth, one, out: Path, layout: str, double: bool, recompute: str) -> None:
    root, theirs = truth
    ranks = run(root, out, layout, double, recompute)
    directory, want = (root / "trained", theirs) if not double else (one(True)[0] / "adapter", one(True)[1])
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], want["losses"], rtol=1e-5)
        np.testing.assert_allclose(rank["norms"], want["norms"], rtol=1e-4)
        assert rank["whole"] == 0  # autograd keeps blocks
        bits = 8 * rank["bytes"] / rank["weights"]
        assert bits == 4.5 if not double else 4.125 < bits < 4.14
    same(out / "adapter", directory, 1e-4)


@pytest.mark.parametrize(("layout", "double", "recompute"), FEW)
def test_adapters_beside_blocks_are_pefts(truth, one, tmp_path, layout, double, recompute):
    check(truth, one, tmp_path, layout, double, recompute)


@pytest.mark.acceptance
@pytest.mark.parametrize(("layout", "double", "recompute"), GRID)
def test_under_every_layout(truth, one, tmp_path, layout, double, recompute):
    check(truth, one, tmp_path, layout, double, recompute)


def test_what_is_exported_is_what_the_blocks_stand_for_with_the_adapters_in(truth, one):
    """Added in float32; the same under layouts, whose ranks cut the groups of scales."""
    root = truth[0]
    out, _ = one(True)
    base, merged, thin = weights(root / "model"), weights(out / "hf"), weights(out / "adapter")
    for name, value in base.items():
        if not name.endswith("_proj.weight"):
            np.testing.assert_array_equal(merged[name], value)
            continue
        part = f"base_model.model.{name.removesuffix('.weight')}"
        whole = torch.from_numpy(value)
        rows, columns = whole.shape
        numbers, scales = torch.empty(rows, columns // 2, dtype=torch.uint8), torch.empty(rows, columns // nf4.BLOCK)
        nf4.quantize(whole, numbers, scales)
        of, largest, offset = nf4.quantize_scales(scales.flatten())
        scales = nf4.dequantize_scales(of, largest.repeat_interleave(nf4.GROUP)[: len(of)], offset).view(scales.shape)
        nf4.dequantize(numbers, scales, whole)
        want = whole.numpy() + 2.0 * thin[f"{part}.lora_B.weight"] @ thin[f"{part}.lora_A.weight"]
        np.testing.assert_allclose(merged[name], want, atol=1e-6)
