"""Layout never changes the mathematics: every layout against transformers and torch autograd in float32."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.lib.layouts import FEW, LAYOUTS, STEPS, check, weights

PAIRWISE = [  # layout, tied, micro-batches, reduction, recompute
    ("TP1", True, 3, "token_mean", "none"),
    ("TP2", False, None, "sum", "full"),
    ("TP2 without SP", True, 2, "sum", "none"),
    ("TP4", True, 3, "token_mean", "selective"),
    ("PP2", False, 3, "sum", "none"),
    ("PP2", True, 1, "token_mean", "full"),
    ("DP2", True, 2, "sum", "selective"),
    ("TP2xPP2", True, 4, "sum", "none"),
    ("DP2xTP2", False, 1, "token_mean", "none"),
]
RECOMPUTE = itertools.cycle(("none", "selective", "full"))
GRID = [
    (name, tied, micro_batches, reduction, next(RECOMPUTE))
    for name, layout in LAYOUTS.items()  # the interleaved schedule takes multiples of the pipeline's ranks only
    for micro_batches in ((None, 2, 4) if "virtual_pipeline" in layout else (None, 1, 3, 4))
    for tied, reduction in itertools.product((False, True), ("sum", "token_mean"))
]


@pytest.mark.parametrize(("name", "tied", "micro_batches", "reduction", "recompute"), PAIRWISE)
def test_layout_equals_hugging_face(truth, tmp_path, name, tied, micro_batches, reduction, recompute):
    check(truth, tmp_path, name, tied, micro_batches, reduction, recompute, steps=FEW)


@pytest.mark.acceptance
@pytest.mark.parametrize(("name", "tied", "micro_batches", "reduction", "recompute"), GRID)
def test_full_grid(truth, tmp_path, name, tied, micro_batches, reduction, recompute):
    check(truth, tmp_path, name, tied, micro_batches, reduction, recompute)


@pytest.mark.parametrize("steps", [FEW, pytest.param(STEPS, marks=pytest.mark.acceptance)])
def test_the_truth_is_sensitive(truth, steps):
    """Training moved the model far enough for 1e-5 to mean something."""
    model, trained, want = truth(False, "sum", steps)
    before, after = weights(model), weights(trained)
    moved = [np.linalg.norm(after[k] - before[k]) / np.linalg.norm(before[k]) for k in before]
    assert min(moved) > 1e-4
    assert want["losses"][-1] != pytest.approx(want["losses"][0], rel=1e-3)
