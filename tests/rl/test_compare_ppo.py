"""The arithmetic of `tools/compare_ppo.py`: shares at equal tokens, pairs of one seed, their standard error."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def tool():
    file = Path(__file__).parents[2] / "tools/compare_ppo.py"
    spec = importlib.util.spec_from_file_location("compare_ppo", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


BEFORE = [{"score": 1.0}, {"score": 0.0}, {"score": None}, {"score": 0.0}, {"score": 0.0}]
LINES = [
    {"generated_tokens": 100, "explained_variance": -1.0},
    {"generated_tokens": 100, "explained_variance": 0.5, "heldout_solve_rate": 0.75},
]


def test_shares_at_equal_tokens(tool):
    found = tool.curve(LINES, BEFORE)
    assert found.solved == ((0, 0.25), (200, 0.75)) and found.explained == (-1.0, 0.5)
    assert [found.at(tokens) for tokens in (0, 100, 200, 300)] == [0.25, 0.5, 0.75, 0.75]


def test_pairs(tool):
    mean, error = tool.paired([0.9, 0.8, 0.7], [0.8, 0.8, 0.8])
    assert mean == pytest.approx(0.0) and error == pytest.approx(0.1 / math.sqrt(3))
    assert math.isnan(tool.paired([0.9], [0.8])[1])


def test_runs_that_ended_are_told_and_not_started_again(tool, tmp_path):
    for kind, seed, rate in (("grpo", 0, 0.7), ("ppo", 0, 0.8), ("grpo", 1, 0.6), ("ppo", 1, 0.9), ("ppo", 2, 0.9)):
        place = tool.directory(tmp_path, kind, seed)
        (place / "rollouts").mkdir(parents=True)
        last = {k: v for k, v in LINES[1].items() if k != "explained_variance" or kind == "ppo"} | {"heldout_solve_rate": rate}
        (place / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (last,)))
        tool.evaluation_file(place, 0).write_text("".join(json.dumps(each) + "\n" for each in BEFORE))
        if (kind, seed) != ("ppo", 2):
            (place / "hf").mkdir()
            tool.run(tmp_path, kind, seed, 1, ["--no.such", "flag"])
    found = {
        kind: {seed: each for seed in range(3) if (each := tool.read(tool.directory(tmp_path, kind, seed)))}
        for kind in ("grpo", "ppo")
    }
    told = tool.table(found)
    assert sorted(found["ppo"]) == [0, 1]
    assert "PPO less GRPO at equal tokens: +20.0%, standard error 10.0% of 2 seeds" in told
    assert "ppo, gain over the start: +60.0%, standard error 5.0% of 2 seeds" in told
    assert not tool.ended(tool.directory(tmp_path, "ppo", 0), 2) and tool.ended(tool.directory(tmp_path, "ppo", 0), None)
    assert "| ppo | 1 | 25.0% | 90.0% of 100 | 0.50, 0.50 |" in told and "| grpo | 0 | 25.0% | 70.0% of 100 |  |" in told
