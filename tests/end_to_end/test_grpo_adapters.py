"""`tulu-mega grpo` with low-rank adapters, then again beginning with those that it left."""

from __future__ import annotations

import pytest

from tests.lib.grpo_runs import STEPS, ended, lines, start, weights

pytestmark = [pytest.mark.servers, pytest.mark.acceptance]


def test_a_policys_adapters_train_and_are_their_own_reference_where_a_run_begins_with_them(place):
    """Servers hold the adapters apart; those of the second run, which asks for it, get whole weights with the adapters merged."""
    begins = ("--lora.adapter", str(place / "fresh/adapter"), "--rollout.adapters", "merged")
    for run, lora, told in (
        ("fresh", ("--lora.rank", "4"), "servers hold the adapters apart: an update is"),
        ("then", begins, "servers get whole weights with the adapters merged: rollout.adapters = 'merged'"),
    ):
        ended(start(place, run, *lora, "--optim.lr", "1e-2"), place, run)
        assert told in (place / f"{run}.log").read_text()
        steps = lines(place / run / "metrics.jsonl")
        assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
        assert all(step["ratio"] == step["ratio_max"] == 1.0 for step in steps)  # one update a step
        assert steps[0]["kl"] == 0.0 and all(step["kl"] > 0 for step in steps[1:])  # at the reference, then away from it
        assert all(step["sampler_difference_max"] < 1e-4 for step in steps)  # vLLM against the trainer
        assert 0 < steps[0]["adapter_norm"] < steps[-1]["adapter_norm"] and 0 < steps[0]["trained_share"] < 1
    first, then = weights(place / "fresh/adapter"), weights(place / "then/adapter")
    assert first.keys() == then.keys() and any((first[name] != then[name]).any() for name in first)
    base, merged = weights(place / "model"), weights(place / "then/hf")
    changed = {name for name in base if name in merged and (base[name] != merged[name]).any()}
    assert changed and all("_proj." in name for name in changed)


def test_ppos_policy_has_them_beside_a_value_model_that_trains_whole(place):
    value = ("--value.path", str(place / "rm"), "--value.lr", "3e-3", "--sampling.samples", "1", "--train.prompts", "6")
    ended(start(place, "ppo_adapters", "--lora.rank", "4", "--optim.lr", "1e-2", *value, stage="ppo"), place, "ppo_adapters")
    steps = lines(place / "ppo_adapters/metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert steps[0]["kl_reward"] == 0.0 and steps[-1]["kl_reward"] != 0.0
    assert all(step["value_grad_norm"] > 0 and step["sampler_difference_max"] < 1e-4 for step in steps)
    assert any(value.any() for name, value in weights(place / "ppo_adapters/adapter").items() if "lora_B" in name)
    trained, first = weights(place / "ppo_adapters/hf_value"), weights(place / "rm")
    assert all((trained[name] != first[name]).any() for name in first)
