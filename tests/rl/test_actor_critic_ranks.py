"""A policy and its value model under every layout: values, losses, gradients and weights as by transformers, autograd and
torch's optimizers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.lib import ppo_jobs, world
from tests.lib.layouts import LAYOUTS, size, weights
from tests.recipes.test_score import job as score

pytestmark = pytest.mark.ranks

CASES = [("TP2", True), ("PP2xVPP2", False), ("DP2", True), ("CP2", False)]
MORE = [("TP1", True), ("TP2 without SP", False), ("PP2", True), ("TP2xPP2", True), ("DP2xTP2", True), ("TP4", False)]
"""layout, whether prompts are shared"""
APART = [("TP2", True, "DP2"), ("PP2xVPP2", False, "TP2")]
APART_MORE = [
    ("TP2xPP2", True, "TP4"), ("TP2xPP2", False, "DP4"), ("DP2", True, "PP2xVPP2"), ("CP2", False, "DP2"), ("DP2", True, "CP2"),
    ("DP2xTP2", True, "TP2xPP2"),
]  # fmt: skip
"""layout, whether prompts are shared, layout of the value model"""
OWN = {**LAYOUTS, "DP4": {"tensor": 1, "data": 4}, "": None}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("ppo"))
    world.run(1, ppo_jobs.make_models, directory)
    return directory, world.run(1, ppo_jobs.hugging_faces, directory)[0]


@pytest.mark.parametrize(("name", "share"), [*CASES, *(pytest.param(*case, marks=pytest.mark.acceptance) for case in MORE)])
def test_layout_equals_autograd(truth, tmp_path, name, share):
    equals_autograd(truth, tmp_path, LAYOUTS[name], share, None, "sgd")


@pytest.mark.parametrize(
    ("name", "share", "of_value"), [*APART, *(pytest.param(*case, marks=pytest.mark.acceptance) for case in APART_MORE)]
)
def test_a_layout_of_the_value_models_own_equals_autograd(truth, tmp_path, name, share, of_value):
    equals_autograd(truth, tmp_path, LAYOUTS[name], share, OWN[of_value], "sgd")


EACH = [*((*case, "") for case in [*CASES, *MORE]), *APART, *APART_MORE]


@pytest.mark.parametrize(
    ("name", "share", "of_value", "updates"),
    [
        pytest.param(*case, kind, marks=[pytest.mark.acceptance] * (case != EACH[0] or kind != "adamw"))
        for case in EACH
        for kind in ("adamw", "five", "gradient")
    ],
)
def test_one_update_of_adamw_five_of_sgd_and_gradients_equal_torchs(truth, tmp_path, name, share, of_value, updates):
    equals_autograd(truth, tmp_path, LAYOUTS[name], share, OWN[of_value], updates)


def equals_autograd(truth, tmp_path, layout, share, of_value, updates) -> None:
    directory, want = truth[0], truth[1][updates]
    ranks = world.run(size(layout), ppo_jobs.engine, directory, layout, str(tmp_path), share, of_value, updates)
    for rank in ranks:
        for model in ("value", "policy"):
            np.testing.assert_allclose([loss for loss, _ in rank[model]], [loss for loss, _ in want[model]], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose([norm for _, norm in rank[model]], [norm for _, norm in want[model]], rtol=1e-5)
    np.testing.assert_allclose(ranks[0]["figures"]["explained_variance"], want["explained_variance"], atol=1e-5)
    assert sorted(ranks[0]["advantages"]) == list(range(6))
    assert all(rank["apart"] <= 1e-6 and rank["same"] for rank in ranks)
    for model in ("policy", "value"):
        ours, theirs = weights(tmp_path / model), weights(f"{directory}/{updates}_{model}")
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            difference = np.linalg.norm(ours[key].astype(np.float64) - value) / np.linalg.norm(value.astype(np.float64))
            assert difference < 1e-5, f"{model} {key}: {difference}"


@pytest.mark.parametrize(
    ("name", "of_value", "updates"),
    [
        pytest.param("DP2", "TP2", "vapo", marks=pytest.mark.acceptance),
        pytest.param("TP2", "", "vapo", marks=pytest.mark.acceptance),
        ("TP1", "", "vapo"),
        pytest.param("TP2", "DP2", "warm-up", marks=pytest.mark.acceptance),
    ],
)
def test_vapo_and_a_warm_up_of_the_value_model_equal_autograd(truth, tmp_path, name, of_value, updates):
    """Several updates of the value model to one of the policy; own lambdas, one by length; values are not clipped; means over
    tokens."""
    equals_autograd(truth, tmp_path, LAYOUTS[name], True, OWN[of_value], updates)
    assert [len(truth[1][updates][model]) for model in ("value", "policy")] == ([6, 2] if updates == "vapo" else [2, 0])


def test_before_any_update_the_value_of_the_last_token_is_what_the_command_score_says(truth, tmp_path):
    """Of the directory that the value model begins as, under another layout."""
    directory = truth[0]
    given = {one.number: one.response.token_ids for group in ppo_jobs.responses(509) for one in group}
    texts, scores = tmp_path / "texts.jsonl", tmp_path / "scores.jsonl"
    texts.write_text("".join(json.dumps({"id": number, "input_ids": ids}) + "\n" for number, ids in given.items()))
    flags = ["--model", f"{directory}/value", "--model.dtype", "fp32", "--input", str(texts), "--output", str(scores)]
    world.run(1, score, flags)
    said = {row["id"]: row["score"] for row in map(json.loads, scores.read_text().splitlines())}
    ranks = world.run(2, ppo_jobs.engine, directory, LAYOUTS["TP2"], str(tmp_path), True, None, "adamw")
    last = ranks[0]["last"]
    assert len(last) == len(given) - 1 and max(abs(last[number] - said[number]) for number in last) <= 1e-6
    assert max(said.values()) - min(said.values()) > 0.1


def test_the_case_is_not_idle(truth):
    """Values are clipped, and both losses move."""
    want = truth[1]["sgd"]
    assert abs(want["explained_variance"]) < 1
    for model in ("value", "policy"):
        losses = [loss for loss, _ in want[model]]
        assert len(losses) == 4 and min(abs(a - b) for a, b in zip(losses, losses[2:], strict=False)) > 1e-5
