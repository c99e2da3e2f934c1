"""Layout never changes the mathematics: every layout against transformers and torch autograd in float32."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed import jobs, world

STEPS, LR = 20, 0.05
LAYOUTS = {
    "TP1": {},
    "TP2": {"tensor": 2},
    "TP2 without SP": {"tensor": 2, "sequence": False},
    "TP4": {"tensor": 4},
    "PP2": {"pipeline": 2},
    "PP4": {"pipeline": 4},
    "DP2": {"data": 2},
    "TP2xPP2": {"tensor": 2, "pipeline": 2},
    "DP2xTP2": {"data": 2, "tensor": 2},
    "DP2xPP2": {"data": 2, "pipeline": 2},
    "CP2": {"context": 2},
    "TP2xCP2": {"tensor": 2, "context": 2},
    "PP2xCP2": {"pipeline": 2, "context": 2},
    "DP2xCP2": {"data": 2, "context": 2},
    "TP2xPP2xCP2": {"tensor": 2, "pipeline": 2, "context": 2},
    "PP2xVPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "TP2xPP2xVPP2": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
    "PP2xVPP2xCP2": {"pipeline": 2, "virtual_pipeline": 2, "context": 2},
    "PP3": {"pipeline": 3},  # 4 layers
    "PP2 uneven": {"pipeline": 2, "first_stage_layers": 1},
}
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


def size(layout: dict) -> int:
    return math.prod(layout.get(axis, 1) for axis in ("tensor", "pipeline", "context", "data"))


def weights(directory: str) -> dict[str, np.ndarray]:
    return {name: tensor for file in Path(directory).glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Hugging Face's answers, computed once for each kind of model and reduction."""
    made = {}

    def get(tied: bool, reduction: str):
        if (tied, reduction) not in made:
            root = tmp_path_factory.mktemp("truth")
            model, trained = str(root / "model"), str(root / "trained")
            world.run(1, jobs.make_model, model, tied)
            made[tied, reduction] = model, trained, world.run(1, jobs.hugging_face, model, reduction, STEPS, LR, trained)[0]
        return made[tied, reduction]

    return get


def check(truth, tmp_path, name, tied, micro_batches, reduction, recompute, lr=LR):
    layout = LAYOUTS[name]
    model, trained, want = truth(tied, reduction)
    out = str(tmp_path / "trained")
    ranks = world.run(size(layout), jobs.engine, model, layout, micro_batches, reduction, STEPS, lr, out, recompute)

    logp = {row: values for rank in ranks for row, values in rank["logp"].items()}
    assert logp.keys() == want["logp"].keys()
    for row, values in want["logp"].items():
        np.testing.assert_allclose(logp[row], values, rtol=0, atol=2e-5)
    for rank in ranks:  # every rank knows loss and norm
        np.testing.assert_allclose(rank["losses"][0], want["losses"][0], rtol=1e-6)
        np.testing.assert_allclose(rank["norms"][0], want["norms"][0], rtol=1e-5)
        assert rank["losses"] == ranks[0]["losses"]
    ours, theirs = weights(out), weights(trained)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        difference = np.linalg.norm(ours[key].astype(np.float64) - value) / np.linalg.norm(value.astype(np.float64))
        assert difference < 1e-5, f"{key}: {difference}"


@pytest.mark.parametrize(("name", "tied", "micro_batches", "reduction", "recompute"), PAIRWISE)
def test_layout_equals_hugging_face(truth, tmp_path, name, tied, micro_batches, reduction, recompute):
    check(truth, tmp_path, name, tied, micro_batches, reduction, recompute)


@pytest.mark.acceptance
@pytest.mark.parametrize(("name", "tied", "micro_batches", "reduction", "recompute"), GRID)
def test_full_grid(truth, tmp_path, name, tied, micro_batches, reduction, recompute):
    check(truth, tmp_path, name, tied, micro_batches, reduction, recompute)


def test_the_truth_is_sensitive(truth):
    """Training moved the model far enough for 1e-5 to mean something."""
    model, trained, want = truth(False, "sum")
    before, after = weights(model), weights(trained)
    moved = [np.linalg.norm(after[k] - before[k]) / np.linalg.norm(before[k]) for k in before]
    assert min(moved) > 1e-4
    assert want["losses"][-1] != pytest.approx(want["losses"][0], rel=1e-3)
