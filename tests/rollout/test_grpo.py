"""`tulu-mega grpo` as users run it: ranks, a live vLLM server, verifiers, a reward model; undisturbed, and killed at each end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from tulu_mega.quickstart import tiny_model

STEPS = 4
VERIFIER = '''
def judge(response, ground_truth, messages=None):
    """Something that a model of random weights does more or less of."""
    return sum(letter in "aeiou" for letter in response) / max(len(response), 1)
'''
LIMIT = 280
"""Seconds for a run."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    pytest.importorskip("vllm")
    directory = tmp_path_factory.mktemp("grpo")
    tiny_model.make(directory / "model", seed=0)
    reward_model(directory / "model", directory / "rm")
    (directory / "own_verifier.py").write_text(VERIFIER)
    rows = [
        {"messages": [{"role": "user", "content": f"Say {number} of them."}], "ground_truth": "x", "dataset": "vowels"}
        for number in range(12)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "prompts.jsonl").write_text(text)
    (directory / "grpo.toml").write_text(
        f"""
model = {{ path = "{directory}/model", dtype = "fp32" }}
data = {{ train = "{directory}/prompts.jsonl", max_prompt = 64 }}
heldout = {{ data = "{directory}/prompts.jsonl", every = 2 }}
sampling = {{ samples = 4, max_tokens = 12, temperature = 0.8 }}
policy = {{ beta = 0.05, overlong = "keep" }}
train = {{ steps = {STEPS}, prompts = 4, mini_batches = 1 }}
optim = {{ lr = 1e-3 }}
parallel = {{ tensor = 2 }}
checkpoint = {{ every = 1, keep = 9 }}

[rewards]
scale = 1.0
custom = {{ vowels = "own_verifier:judge" }}
workers = 1
model = "{directory}/rm"
model_weight = 0.1
"""
    )
    return directory


def reward_model(source: Path, directory: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(source, num_labels=1, pad_token_id=None)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)


def start(place: Path, run: str, *flags: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tulu_mega", "grpo", str(place / "grpo.toml"), "--run_dir", str(place / run), *flags]
    with (place / f"{run}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def ended(process: subprocess.Popen, place: Path, run: str) -> None:
    try:
        status = process.wait(LIMIT)
    finally:
        process.kill()
    assert status == 0, (place / f"{run}.log").read_text()[-4000:]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def undisturbed(place) -> Path:
    ended(start(place, "undisturbed"), place, "undisturbed")
    return place / "undisturbed"


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


def test_the_model_is_exported_and_nothing_is_left(undisturbed, place):
    trained, first = weights(undisturbed / "hf"), weights(place / "model")
    assert trained.keys() == first.keys() and any(not np.array_equal(trained[name], first[name]) for name in first)
    assert not (undisturbed / "servers").exists()
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(undisturbed) in " ".join(each.info["cmdline"] or ())]


def weights(directory: Path) -> dict[str, np.ndarray]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def test_killed_servers_and_ranks_change_nothing(undisturbed, place):
    """A server is killed after step 1, a rank after step 2; the rest is the same to the last bit."""
    run = place / "disturbed"
    process = start(place, "disturbed", "--restarts", "2")
    launcher = psutil.Process(process.pid)
    try:
        after(process, run, 1)
        os.kill(json.loads((run / "servers/server_0.json").read_text())["pid"], 9)
        after(process, run, 2)
        next(each for each in launcher.children(recursive=True) if rank_of(each) == "1").kill()
    finally:
        ended(process, place, "disturbed")
    told = (place / "disturbed.log").read_text()
    assert "started again" in told
    for name in ("loss", "grad_norm", "reward", "kl", "response_length", "sampler_difference"):
        same = [[step[name] for step in lines(directory / "metrics.jsonl")] for directory in (undisturbed, run)]
        assert same[0] == same[1], name
    for step in range(1, STEPS + 1):
        file = f"rollouts/step_{step:06}.jsonl"
        assert (run / file).read_text() == (undisturbed / file).read_text()
    ours, theirs = weights(run / "hf"), weights(undisturbed / "hf")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def after(process: subprocess.Popen, run: Path, steps: int) -> None:
    """Waits until so many steps are done."""
    until = time.monotonic() + LIMIT
    while len(lines(run / "metrics.jsonl")) < steps:
        assert process.poll() is None and time.monotonic() < until, f"step {steps} was not reached"
        time.sleep(0.05)


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK") if "grpo" in process.cmdline() else None
    except psutil.Error:
        return None
