"""Every policy objective under every layout against transformers and torch autograd: loss to 1e-6, gradient norm to 1e-5."""

from __future__ import annotations

import numpy as np
import pytest

from tests.lib import jobs, policy_jobs, world
from tests.lib.layouts import LAYOUTS, size

pytestmark = pytest.mark.ranks

PPO = {"clip_low": 0.2, "clip_high": 0.2}
OBJECTIVES = {
    "grpo": PPO | {"loss": "grpo", "aggregation": "token", "beta": 0.05, "importance": "token", "importance_cap": 1.3},
    "dapo, entropy, responses weighed": {
        "loss": "dapo", "clip_low": 0.2, "clip_high": 0.28, "aggregation": "token", "entropy": 0.3,
        "importance": "sequence", "importance_cap": 3.0,
    },
    "grpo, responses alike, k2, tokens left out": PPO | {
        "loss": "grpo", "aggregation": "sequence", "beta": 0.1, "kl": "k2", "importance": "token", "mask_above": 1.5,
    },
    "cispo, tokens left out, not weighed": {
        "loss": "cispo", "clip_low": 1.0, "clip_high": 0.28, "aggregation": "token", "mask_above": 1.4,
    },
    "gspo, k1, entropy": {
        "loss": "gspo", "clip_low": 0.03, "clip_high": 0.04, "aggregation": "sequence", "beta": 0.1, "kl": "k1",
        "importance": "token", "entropy": 0.1,
    },
    "gspo by tokens, responses left out": {
        "loss": "gspo", "clip_low": 0.03, "clip_high": 0.04, "aggregation": "token", "importance": "sequence", "mask_above": 4.0,
    },
    "grpo by a constant, warmer": PPO | {"loss": "grpo", "aggregation": "constant", "beta": 0.01, "temperature": 1.3},
}  # fmt: skip
PAIRWISE = [  # layout, tied, micro-batches
    ("TP1", False, None),
    ("TP1", True, 5),
    ("TP2", True, 2),
    ("PP2", False, 3),
    ("CP2", False, 2),
    ("DP2", True, 2),
    ("TP2xPP2", False, 4),
    ("DP2xCP2", False, 1),
    ("TP4", True, 3),  # more than two ranks to sum: the order counts
    ("PP2xVPP2", True, 2),
    ("TP1", False, "shared"),
    ("TP2xPP2", True, "shared"),
    ("DP2xTP2", False, "shared"),
]
GRID = [
    (name, tied, micro_batches)
    for name, layout in LAYOUTS.items()
    for tied in (False, True)
    for micro_batches in ((2, 4) if "virtual_pipeline" in layout else (1, 3, 5)) + (() if "context" in layout else ("shared",))
]


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Model, columns and what transformers makes of them, once for each kind of model."""
    made = {}

    def get(tied: bool):
        if tied not in made:
            model = str(tmp_path_factory.mktemp("policy") / "model")
            world.run(1, jobs.make_model, model, tied)
            given = world.run(1, policy_jobs.columns, model)[0]
            made[tied] = model, given, world.run(1, policy_jobs.hugging_face, model, OBJECTIVES, given)[0]
        return made[tied]

    return get


def check(truth, name, tied, micro_batches):
    model, given, want = truth(tied)
    layout = LAYOUTS[name]
    for rank in world.run(size(layout), policy_jobs.engine, model, layout, micro_batches, OBJECTIVES, given):
        for objective, (loss, norm, metrics, count) in want.items():
            found_loss, found_norm, found, found_count, evaluated = rank[objective]
            np.testing.assert_allclose(found_loss, loss, rtol=1e-6, err_msg=objective)
            np.testing.assert_allclose(found_norm, norm, rtol=1e-5, err_msg=objective)
            np.testing.assert_allclose(evaluated, found_loss, rtol=1e-6, err_msg=objective)
            assert found_count == count  # each token or response once, whatever is parallel
            assert found.keys() == metrics.keys()
            for key, value in metrics.items():
                np.testing.assert_allclose(found[key], value, rtol=2e-5, atol=1e-6, err_msg=f"{objective}: {key}")
        alike = rank[""]  # scored, then trained on, by the same weights and the same packs: equal bits
        assert (alike["ratio"], alike["ratio_max"], alike["kl"], alike["sampler_difference_max"]) == (1, 1, 0, 0)
        assert (alike["importance_weight"], alike["clip_low"], alike["clip_high"]) == (1, 0, 0)


@pytest.mark.parametrize(
    ("name", "tied", "micro_batches"),
    [*PAIRWISE[:8], *(pytest.param(*case, marks=pytest.mark.acceptance) for case in PAIRWISE[8:])],
)
def test_layout_equals_autograd(truth, name, tied, micro_batches):
    check(truth, name, tied, micro_batches)


@pytest.mark.acceptance
@pytest.mark.parametrize(("name", "tied", "micro_batches"), GRID)
def test_full_grid(truth, name, tied, micro_batches):
    check(truth, name, tied, micro_batches)


def test_the_cases_are_not_idle(truth):
    """Every clip, cut and mask that the comparison is about happens in it."""
    want = truth(False)[2]
    for key in ("clip_low", "clip_high", "importance_cut", "importance_left_out", "kl"):
        assert max(metrics.get(key, 0) for _, _, metrics, _ in want.values()) > 0.02
    assert all(abs(loss) > 0.05 for loss, _, _, _ in want.values())


@pytest.mark.parametrize("name", ["TP1", "PP2xVPP2", "TP2xCP2"])
def test_a_frozen_reference_beside_a_policy(truth, name):
    model, layout = truth(True)[0], LAYOUTS[name]
    ranks = world.run(size(layout), policy_jobs.frozen_reference, model, layout)
    for rank in ranks:
        assert rank["applied"] and not rank["training"] and not rank["gradients"]  # weights and no more
        assert all(rank["same"]) and all(rank["still"]) and all(rank["moved"])
    assert any(rank["moved"] for rank in ranks)  # the last stage's ranks have scores
