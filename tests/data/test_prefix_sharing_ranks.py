"""Packs in which the responses to a prompt share its tokens equal transformers on every response by itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.lib import families, sharing_jobs, world
from tests.lib.layouts import LAYOUTS, size, weights

pytestmark = pytest.mark.ranks

LR = 0.02
PAIRWISE = [  # family, layout, recompute
    ("Mistral", "TP1", "none"),
    ("Mistral", "PP2xVPP2", "full"),
    ("Qwen 2", "TP2", "selective"),
    ("Qwen 3", "DP2", "none"),
    ("Mistral with windows", "TP2 without SP", "none"),
    ("OLMo 2", "TP2xPP2", "none"),
    ("OLMo 3", "DP2xTP2", "full"),
]
GRID = [
    (family, name, recompute)
    for (family, name), recompute in zip(
        itertools.product(families.FAMILIES, [name for name, layout in LAYOUTS.items() if "context" not in layout]),
        itertools.cycle(["none", "selective", "full"]),
        strict=False,
    )
]


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    made = {}

    def get(family: str):
        if family not in made:
            directory = tmp_path_factory.mktemp("sharing")
            model, trained = str(directory / "model"), str(directory / "trained")
            world.run(1, families.make_model, model, family)
            made[family] = model, trained, world.run(1, sharing_jobs.hugging_face, model, LR, trained)[0]
        return made[family]

    return get


def check(truth, tmp_path, family, name, recompute):
    model, trained, want = truth(family)
    layout, out = LAYOUTS[name], str(tmp_path / "trained")
    ranks = world.run(size(layout), sharing_jobs.engine, model, layout, LR, out, recompute)
    logp = {row: values for rank in ranks for row, values in rank["logp"].items()}
    assert logp.keys() == want["logp"].keys()
    for row, values in want["logp"].items():
        np.testing.assert_allclose(logp[row], values, rtol=0, atol=2e-5)
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], want["losses"], rtol=1e-6)
        np.testing.assert_allclose(rank["norms"], want["norms"], rtol=1e-5)
    ours, theirs = weights(out), weights(trained)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        difference = np.linalg.norm(ours[key].astype(np.float64) - value) / np.linalg.norm(value.astype(np.float64))
        assert difference < 1e-5, f"{key}: {difference}"


@pytest.mark.parametrize(("family", "layout", "recompute"), PAIRWISE)
def test_sharing_changes_nothing(truth, tmp_path, family, layout, recompute):
    check(truth, tmp_path, family, layout, recompute)


@pytest.mark.acceptance
@pytest.mark.parametrize(("family", "layout", "recompute"), GRID)
def test_full_grid(truth, tmp_path, family, layout, recompute):
    check(truth, tmp_path, family, layout, recompute)
