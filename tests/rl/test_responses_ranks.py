"""Responses of several segments under layouts: loss, gradient and weights as by transformers with the same mask."""

from __future__ import annotations

import numpy as np
import pytest

from tests.lib import jobs, response_jobs, world
from tests.lib.layouts import LAYOUTS, size, weights

LR = 0.05
CASES = [("TP1", False), ("TP1", True), ("TP2", True), ("PP2", True), ("CP2", True), ("DP2", True), ("TP2xPP2", True)]
"""layout, whether prompts are shared"""


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    directory = tmp_path_factory.mktemp("responses")
    model, trained = str(directory / "model"), str(directory / "trained")
    world.run(1, jobs.make_model, model, False)
    return model, trained, world.run(1, response_jobs.hugging_face, model, LR, trained)[0]


@pytest.mark.parametrize(("name", "share"), CASES)
def test_layout_equals_autograd(truth, tmp_path, name, share):
    model, trained, (loss, norm, count) = truth
    layout, out = LAYOUTS[name], str(tmp_path / "trained")
    for found in world.run(size(layout), response_jobs.engine, model, layout, LR, out, share):
        np.testing.assert_allclose(found[0], loss, rtol=1e-6)
        np.testing.assert_allclose(found[1], norm, rtol=1e-5)
        assert found[2] == count
        if share and size(layout) == layout.get("tensor", 1) * layout.get("pipeline", 1):  # on two data ranks few are together
            assert found[3] > 0
        if not share or "context" in layout:
            assert found[3] == 0
    ours, theirs = weights(out), weights(trained)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        difference = np.linalg.norm(ours[key].astype(np.float64) - value) / np.linalg.norm(value.astype(np.float64))
        assert difference < 1e-5, f"{key}: {difference}"
