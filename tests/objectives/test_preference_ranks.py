"""Every pair objective under every layout against transformers and torch autograd: loss to 1e-6, gradient norm to 1e-5."""

from __future__ import annotations

import numpy as np
import pytest

from tests.lib import families, preference_jobs, world
from tests.lib.layouts import LAYOUTS, size
from tests.lib.truths import Truths
from tulu_mega.config.preference import PREFERENCE_LOSSES

pytestmark = pytest.mark.ranks

OBJECTIVES = {name: {"loss": name} for name in PREFERENCE_LOSSES} | {
    "dpo, smoothed": {"loss": "dpo", "beta": 0.1, "label_smoothing": 0.1},
    "dpo_norm with SFT": {"loss": "dpo_norm", "beta": 5.0, "label_smoothing": 0.05, "sft_weight": 0.5},
}
PAIRWISE = [  # family, layout, micro-batches
    ("Llama", "TP1", None),
    ("Llama tied", "TP1", 5),  # a pair in each: not packed
    ("Llama tied", "DP2", 2),
    ("Llama", "TP2xPP2", 4),
    ("Llama", "DP2xCP2", 1),
    ("Llama tied", "PP2xVPP2", 2),
    ("Qwen 2", "PP2xCP2", 2),
    ("Qwen 2 with windows", "DP2", 1),
    ("Qwen 3", "TP2 without SP", 2),
    ("Qwen 3", "PP2", 3),
    ("Mistral with windows", "TP2xCP2", 2),
    ("OLMo 2", "DP2xPP2", 2),
    ("OLMo 3", "CP2", 3),
]
GRID = [
    (family, name, micro_batches)
    for name, layout in LAYOUTS.items()
    for family in families.LLAMAS
    for micro_batches in ((2, 4) if "virtual_pipeline" in layout else (1, 3, 5))
] + [("OLMo 2", "TP4", 2), ("OLMo 2", "TP2", 2), ("OLMo 3", "PP2xVPP2", 4), ("Qwen 2", "TP2", 3), ("Qwen 3", "TP2xPP2", 3)]


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """A reference for each family, and what transformers makes of model and reference."""

    def answers(model: str, _trained: str):
        ref = world.run(1, preference_jobs.reference, model)[0]
        return ref, world.run(1, preference_jobs.hugging_face, model, OBJECTIVES, ref)[0]

    return Truths(tmp_path_factory, families.make_language_model, answers)


def check(truth, family, name, micro_batches):
    model, _, (ref, want) = truth(family)
    layout = LAYOUTS[name]
    for rank in world.run(size(layout), preference_jobs.engine, model, layout, micro_batches, OBJECTIVES, ref):
        for objective, (loss, norm, metrics, evaluated, count) in rank.items():
            np.testing.assert_allclose(loss, want[objective][0], rtol=1e-6, err_msg=objective)
            np.testing.assert_allclose(norm, want[objective][1], rtol=1e-5, err_msg=objective)
            np.testing.assert_allclose(evaluated, loss, rtol=1e-6, err_msg=objective)
            assert count == len(ref) // 2  # each pair once, whatever is parallel
            assert 0 <= metrics["accuracy"] <= 1


@pytest.mark.parametrize(
    ("family", "layout", "micro_batches"),
    [*PAIRWISE[:8], *(pytest.param(*case, marks=pytest.mark.acceptance) for case in PAIRWISE[8:])],
)
def test_layout_equals_autograd(truth, family, layout, micro_batches):
    check(truth, family, layout, micro_batches)


@pytest.mark.acceptance
@pytest.mark.parametrize(("family", "layout", "micro_batches"), GRID)
def test_full_grid(truth, family, layout, micro_batches):
    check(truth, family, layout, micro_batches)
