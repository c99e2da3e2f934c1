"""`tulu-mega grpo` as users run it: ranks, a live vLLM server, verifiers, a reward model; undisturbed, and killed at each end."""

from __future__ import annotations

import json
import os

import numpy as np
import psutil
import pytest

from tests.lib.grpo_runs import STEPS, after, check_same, ended, lines, processes_of, rank_of, start, weights
from tests.lib.other_python import other_python

pytestmark = pytest.mark.servers


def test_the_first_step_is_on_policy_and_at_the_reference(undisturbed):
    steps = lines(undisturbed / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert all(step["ratio"] == step["ratio_max"] == 1.0 for step in steps)  # one update a step
    assert steps[0]["kl"] == 0.0 and all(step["kl"] > 0 for step in steps[1:])
    assert all(step["sampler_difference_max"] < 1e-4 for step in steps)  # vLLM against the trainer, at temperature 0.8
    assert all(step["grad_norm"] > 0 and step["groups"] == 4 and step["updates"] == 1 for step in steps)
    assert [("heldout_score" in step) for step in steps] == [False, True, False, True]


def test_every_response_is_kept_with_what_it_earned(undisturbed, place):
    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(place / "rm")
    model = LlamaForSequenceClassification.from_pretrained(place / "rm")
    for step in range(1, STEPS + 1):
        told = lines(undisturbed / f"rollouts/step_{step:06}.jsonl")
        assert len(told) == 16 and {one["version"] for one in told} == {step - 1}
        assert all(one["trained"] and one["logp_difference_max"] < 1e-4 for one in told)
        for place_of in {one["place"] for one in told}:
            advantages = [one["advantage"] for one in told if one["place"] == place_of]
            assert sum(advantages) == pytest.approx(0, abs=1e-6)
    one = told[0]
    vowels = sum(letter in "aeiou" for letter in one["response"]) / max(len(one["response"]), 1)
    assert one["scores"]["vowels"] == pytest.approx(vowels)
    assert one["reward"] == pytest.approx(vowels + 0.1 * one["model_score"], abs=1e-6)
    if one["finish_reason"] == "length":  # else eos, which is no text, is part of what was scored
        text = f"<|user|>\n{one['messages'][0]['content']}\n<|assistant|>\n"
        ids = tokenizer(text + one["response"], add_special_tokens=False)["input_ids"]
        if len(ids) == len(tokenizer(text, add_special_tokens=False)["input_ids"]) + one["tokens"]:
            with torch.no_grad():
                assert float(model(torch.tensor([ids])).logits[0, 0]) == pytest.approx(one["model_score"], abs=2e-5)
    assert len(lines(undisturbed / "rollouts/heldout_000000.jsonl")) == 12


def test_the_model_is_exported(undisturbed, place):
    trained, first = weights(undisturbed / "hf"), weights(place / "model")
    assert trained.keys() == first.keys() and any(not np.array_equal(trained[name], first[name]) for name in first)


@pytest.mark.parametrize("server_too", [False, pytest.param(True, marks=pytest.mark.acceptance)], ids=["rank", "server and rank"])
def test_what_is_killed_changes_nothing(undisturbed, place, server_too):
    """A server of its own is killed after step 1, a rank after step 2; the rest is the same to the last bit, and nothing is left
    running. tests/inference/test_servers.py kills a server for less. The server that is killed is started by the Python of
    another environment (`rollout.python`), which changes nothing either."""
    name = f"disturbed_{server_too}"
    run = place / name
    other = ["--rollout.python", str(other_python(place / "other"))] if server_too else []
    process = start(place, name, "--restarts", "2", *other)
    launcher = psutil.Process(process.pid)
    try:
        if server_too:
            after(process, run, 1)
            assert any(each.cmdline()[:1] == other[1:] for each in launcher.children(recursive=True))
            os.kill(json.loads((run / "servers/server_0.json").read_text())["pid"], 9)
        after(process, run, 2)
        next(each for each in launcher.children(recursive=True) if rank_of(each) == "1").kill()
    finally:
        ended(process, place, name)
    told = (place / f"{name}.log").read_text()
    assert "started again" in told
    check_same(run, undisturbed)
    assert not (run / "servers").exists()
    assert not processes_of(run)
