"""Every pair objective under every layout against transformers and torch autograd: loss to 1e-6, gradient norm to 1e-5."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed import jobs, preference_jobs, world
from tests.distributed.layouts import LAYOUTS, size

OBJECTIVES = {
    "dpo": {"loss": "dpo", "beta": 0.1},
    "dpo, smoothed": {"loss": "dpo", "beta": 0.1, "label_smoothing": 0.1},
    "dpo_norm": {"loss": "dpo_norm", "beta": 5.0},
    "dpo_norm with SFT": {"loss": "dpo_norm", "beta": 5.0, "label_smoothing": 0.05, "sft_weight": 0.5},
    "ipo": {"loss": "ipo", "beta": 0.1},
    "simpo": {"loss": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.3},
}
PAIRWISE = [  # layout, tied, micro-batches
    ("TP1", False, None),
    ("TP1", True, 5),  # a pair in each: not packed
    ("TP2", True, 2),
    ("PP2", False, 3),
    ("CP2", False, 2),
    ("DP2", True, 2),
    ("TP2xPP2", False, 4),
    ("DP2xCP2", False, 1),
    ("PP2xVPP2", True, 2),
]
GRID = [
    (name, tied, micro_batches)
    for name, layout in LAYOUTS.items()
    for tied in (False, True)
    for micro_batches in ((2, 4) if "virtual_pipeline" in layout else (1, 3, 5))
]


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Model, reference and what transformers makes of them, once for each kind of model."""
    made = {}

    def get(tied: bool):
        if tied not in made:
            model = str(tmp_path_factory.mktemp("preference") / "model")
            world.run(1, jobs.make_model, model, tied)
            ref = world.run(1, preference_jobs.reference, model)[0]
            made[tied] = model, ref, world.run(1, preference_jobs.hugging_face, model, OBJECTIVES, ref)[0]
        return made[tied]

    return get


def check(truth, name, tied, micro_batches):
    model, ref, want = truth(tied)
    layout = LAYOUTS[name]
    for rank in world.run(size(layout), preference_jobs.engine, model, layout, micro_batches, OBJECTIVES, ref):
        for objective, (loss, norm, metrics, evaluated, count) in rank.items():
            np.testing.assert_allclose(loss, want[objective][0], rtol=1e-6, err_msg=objective)
            np.testing.assert_allclose(norm, want[objective][1], rtol=1e-5, err_msg=objective)
            np.testing.assert_allclose(evaluated, loss, rtol=1e-6, err_msg=objective)
            assert count == len(ref) // 2  # each pair once, whatever is parallel
            assert 0 <= metrics["accuracy"] <= 1


@pytest.mark.parametrize(("name", "tied", "micro_batches"), PAIRWISE)
def test_layout_equals_autograd(truth, name, tied, micro_batches):
    check(truth, name, tied, micro_batches)


@pytest.mark.acceptance
@pytest.mark.parametrize(("name", "tied", "micro_batches"), GRID)
def test_full_grid(truth, name, tied, micro_batches):
    check(truth, name, tied, micro_batches)
