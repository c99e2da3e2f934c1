"""The layouts that every comparison with transformers runs under, and the comparison."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.lib import jobs, world

STEPS, LR = 20, 0.05
FEW = 3
"""steps of the parts of grids that `make test` takes"""
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


def size(layout: dict) -> int:
    """Processes of a layout."""
    return math.prod(layout.get(axis, 1) for axis in ("tensor", "pipeline", "context", "data"))


def weights(directory: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a directory's safetensors files."""
    return {name: tensor for file in Path(directory).glob("*.safetensors") for name, tensor in load_file(file).items()}


def check(truth, tmp_path, name, kind, micro_batches, reduction, recompute, lr=LR, steps=STEPS):
    """Log-probs, losses, norms and trained weights of the engine under a layout against transformers (`truth`)."""
    layout = LAYOUTS[name]
    model, trained, want = truth(kind, reduction, steps)
    out = str(tmp_path / "trained")
    ranks = world.run(size(layout), jobs.engine, model, layout, micro_batches, reduction, steps, lr, out, recompute)

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
