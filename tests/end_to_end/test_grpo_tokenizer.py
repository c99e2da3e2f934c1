"""Reinforcement learning with another tokenizer than the model's own: its eos ends responses, in training and of the export."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from tests.lib.grpo_runs import ended, lines, make_place, start
from tests.lib.tokenizers import EOS as OTHER
from tests.lib.tokenizers import byte_tokenizer
from tulu_mega.inference.offline import Completion, Generator, Sampling

pytestmark = pytest.mark.servers

EOS = 260
"""Of the tokenizer; for the model's own it is a part of a word, and its directory names another eos."""


@pytest.fixture(scope="module")
def run(tmp_path_factory, served) -> Path:
    """A step of two mini-batches, whose loss counts responses."""
    pytest.importorskip("vllm")
    place = make_place(tmp_path_factory.mktemp("grpo"))
    for directory in ("tokenizer", "rm"):  # a reward model is to read what the policy writes
        byte_tokenizer(eos_token="<|im_end|>").save_pretrained(place / directory)
    assert AutoTokenizer.from_pretrained(place / "tokenizer").eos_token_id == EOS
    assert GenerationConfig.from_pretrained(place / "model").eos_token_id == 0
    values = {
        "data.tokenizer": place / "tokenizer", "policy.aggregation": "sequence", "train.mini_batches": 2, "train.steps": 1,
        "sampling.max_tokens": 64, "sampling.samples": 8, "parallel.tensor": 1,
    }  # fmt: skip
    flags, variables = served
    flags = [*flags, *(text for name, value in values.items() for text in (f"--{name}", str(value)))]
    ended(start(place, "run", *flags, **variables), place, "run")
    return place / "run"


def test_its_eos_ends_responses(run):
    responses = lines(run / "rollouts/step_000001.jsonl")
    stopped = [row for row in responses if row["finish_reason"] == "stop"]
    assert all(row["tokens"] == 64 for row in responses if row["finish_reason"] == "length")
    # the other one, of the model's directory, is no special token of this tokenizer and is text
    assert any(row["tokens"] < 64 and not row["response"].endswith(OTHER) for row in stopped)


def test_figures_are_means_over_trained_tokens(run):
    """As its responses have them, which are of different lengths."""
    (metrics,) = lines(run / "metrics.jsonl")
    trained = [row for row in lines(run / "rollouts/step_000001.jsonl") if row["trained"]]
    tokens = sum(row["tokens"] for row in trained)
    mean = sum(row["logp_difference_mean"] * row["tokens"] for row in trained) / tokens
    assert metrics["updates"] == 2 and metrics["supervised_tokens"] == tokens
    assert metrics["sampler_difference"] == pytest.approx(mean, rel=1e-5)


def test_the_exported_directory_says_what_ends(run):
    assert AutoTokenizer.from_pretrained(run / "hf").eos_token_id == EOS
    assert GenerationConfig.from_pretrained(run / "hf").eos_token_id == [EOS, 0]  # token 0 is the same in both


@pytest.mark.acceptance
def test_vllm_ends_at_it_by_what_the_exported_directory_says(run):
    """Nothing tells it of the tokenizer's eos: neither the one who asks nor the tokenizer, which it does not load."""
    with Generator(str(run / "hf"), log=run / "vllm.log") as vllm:
        assert vllm([[5, 6, 7]], Sampling(max_tokens=5, allowed_ids=(EOS,))) == [[Completion([EOS], "stop")]]
        assert vllm([[5, 6, 7]], Sampling(max_tokens=5, allowed_ids=(EOS - 1,))) == [[Completion([EOS - 1] * 5, "length")]]
