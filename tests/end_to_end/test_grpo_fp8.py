"""`tulu-mega grpo` with servers in FP8 blocks: samples are of rounded weights, which importance weights make up for; a server
that is killed is started again and gets blocks again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.lib.grpo_runs import STEPS, after, check_same, ended, lines, start
from tests.weight_transfer.live.fp8 import CAN_SERVE

pytestmark = [pytest.mark.servers, pytest.mark.acceptance, pytest.mark.timeout(900), CAN_SERVE]


@pytest.fixture(scope="module")
def flags(place) -> list[str]:
    """A model whose matrices are whole blocks, and servers that round them."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(place / "model", intermediate_size=384, num_key_value_heads=4)
    LlamaForCausalLM(config).save_pretrained(place / "blocks")
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(place / "blocks")
    return ["--model.path", str(place / "blocks"), "--rollout.dtype", "bf16", "--rollout.quantization", "fp8"]


@pytest.fixture(scope="module")
def rounded(place, flags) -> Path:
    ended(start(place, "rounded", *flags), place, "rounded")
    return place / "rounded"


def test_samples_are_of_rounded_weights_and_weighted(rounded):
    steps = lines(rounded / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert all(step["ratio"] == step["ratio_max"] == 1.0 for step in steps)  # the trainer's own probabilities are not rounded
    assert all(0.002 < step["sampler_difference"] < 0.2 for step in steps)
    assert all(0.9 < step["importance_weight"] < 1.1 and step["importance_weight"] != 1.0 for step in steps)
    assert all(step["grad_norm"] > 0 for step in steps)


def test_a_killed_server_gets_blocks_again(rounded, place, flags):
    run = place / "rounded_and_killed"
    process = start(place, run.name, *flags)
    try:
        after(process, run, 1)
        os.kill(json.loads((run / "servers/server_0.json").read_text())["pid"], 9)
    finally:
        ended(process, place, run.name)
    assert "started again" in (place / f"{run.name}.log").read_text()
    check_same(run, rounded)
