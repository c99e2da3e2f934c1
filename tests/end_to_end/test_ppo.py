"""`tulu-mega ppo` as users run it: ranks, a live vLLM server, verifiers, a reward model that becomes the value model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import psutil
import pytest

from tests.inference.test_reward_vllm import ENVIRONMENT, POOL
from tests.lib.grpo_runs import STEPS, after, check_same, ended, lines, rank_of, start, weights

pytestmark = pytest.mark.servers
PPO = ["--value.path", "rm", "--value.lr", "3e-3", "--sampling.samples", "1", "--train.prompts", "6", "--train.passes", "2"]


def flags(place, served) -> list[str]:
    return [*served[0], *PPO[:1], str(place / "rm"), *PPO[2:]]


@pytest.fixture(scope="module")
def undisturbed(place, served):
    ended(start(place, "ppo", *flags(place, served), stage="ppo", **served[1]), place, "ppo")
    return place / "ppo"


def test_both_models_learn(undisturbed, place):
    import torch
    from transformers import AutoModelForSequenceClassification

    steps = lines(undisturbed / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for step in steps:
        assert step["updates"] == 2 and step["responses"] == 6 and step["sampler_difference_max"] < 1e-4
        assert step["value_grad_norm"] > 0 and step["value_lr"] == 3e-3 and step["explained_variance"] <= 1
    assert steps[0]["kl_reward"] == 0.0 and steps[-1]["kl_reward"] != 0.0  # the policy begins as the reference
    told = lines(undisturbed / "rollouts/step_000001.jsonl")
    assert len(told) == 6 and all(one["trained"] for one in told)
    assert sum(one["advantage"] for one in told if one["advantage"] is not None) == pytest.approx(0, abs=3)
    trained, first = weights(undisturbed / "hf_value"), weights(place / "rm")
    assert trained.keys() == first.keys() and not np.array_equal(trained["score.weight"], first["score.weight"])
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(undisturbed / "hf_value")
        assert model.num_labels == 1 and model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_values_become_better(undisturbed):
    losses = [step["value_loss"] for step in lines(undisturbed / "metrics.jsonl")]
    assert losses[-1] < losses[0]


@pytest.mark.acceptance
@pytest.mark.timeout(600)
def test_vllm_gives_the_values_that_transformers_does(undisturbed, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification

    model, source = tmp_path / "value", tmp_path / "texts.json"
    shutil.copytree(undisturbed / "hf_value", model)
    texts = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [7]]
    source.write_text(json.dumps(texts))
    command = [sys.executable, "-c", POOL, str(source), str(model)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    ours = json.loads((tmp_path / "value.scores.json").read_text())
    with torch.no_grad():
        value = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
        theirs = [value(torch.tensor([ids])).logits[0].tolist() for ids in texts]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.acceptance
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_rank_that_is_killed_changes_nothing(undisturbed, place, served, step):
    """Policy, value model and both optimizers go on to the last bit."""
    name = f"ppo_killed_{step}"
    process = start(place, name, "--restarts", "1", *flags(place, served), stage="ppo", **served[1])
    try:
        after(process, place / name, step)
        launcher = psutil.Process(process.pid)
        os.kill(next(each for each in launcher.children(recursive=True) if rank_of(each) == "1").pid, 9)
    finally:
        ended(process, place, name)
    check_same(place / name, undisturbed, figures=("kl_reward", "value_loss", "value_grad_norm", "explained_variance"))
    ours, theirs = weights(place / name / "hf_value"), weights(undisturbed / "hf_value")
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
