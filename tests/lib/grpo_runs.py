"""`tulu-mega grpo` as a process of its own, on a model, prompts, a verifier and a reward model that are made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import psutil
from safetensors.numpy import load_file

from tests.invariant import material
from tests.invariant.stages import HIDDEN

STEPS = 4
VERIFIER = '''
def judge(response, ground_truth, messages=None):
    """Something that a model of random weights does more or less of."""
    return sum(letter in "aeiou" for letter in response) / max(len(response), 1)
'''
LIMIT = 280
"""Seconds for a run."""


def make_place(directory: Path) -> Path:
    """Everything a run reads; `grpo.toml` has its settings."""
    material.make_model(directory / "model", hidden=HIDDEN)
    material.write_json(directory / "model/generation_config.json", {"eos_token_id": 0})
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


def start(place: Path, run: str, *flags: str, stage: str = "grpo", **variables: str) -> subprocess.Popen:
    """Begins a run of a stage that takes the settings; `variables` are further environment variables."""
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "tulu_mega", stage, str(place / "grpo.toml"), "--run_dir", str(place / run), *flags]
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


def weights(directory: Path) -> dict[str, np.ndarray]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


FIGURES = ("loss", "grad_norm", "reward", "response_length", "sampler_difference")


def check_same(run: Path, other: Path, responses: Iterable[int] = range(1, STEPS + 1), figures: Sequence[str] = ("kl",)) -> None:
    """Metrics, responses of these steps and weights to the last bit.

    Args:
        figures: further metrics.
    """
    for name in (*FIGURES, *figures):
        ours, theirs = ([step[name] for step in lines(directory / "metrics.jsonl")] for directory in (run, other))
        assert ours == theirs, name
    for step in responses:
        file = f"rollouts/step_{step:06}.jsonl"
        assert (run / file).read_text() == (other / file).read_text()
    ours, theirs = weights(run / "hf"), weights(other / "hf")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def processes_of(run: Path) -> list[psutil.Process]:
    """Whatever still runs with the run's directory on its command line."""
    return [each for each in psutil.process_iter(["cmdline"]) if str(run) in " ".join(each.info["cmdline"] or ())]


def after(process: subprocess.Popen, run: Path, steps: int) -> None:
    """Waits until so many steps are done."""
    until = time.monotonic() + LIMIT
    while len(lines(run / "metrics.jsonl")) < steps:
        assert process.poll() is None and time.monotonic() < until, f"step {steps} was not reached"
        time.sleep(0.05)


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK") if {"grpo", "ppo"} & {*process.cmdline()} else None
    except psutil.Error:
        return None
