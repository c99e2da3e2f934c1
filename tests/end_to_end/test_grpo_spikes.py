"""`tulu-mega grpo` where a gradient leaps: the update is left out, or the run stops, and either goes on to the same bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.lib.grpo_runs import LIMIT, check_same, ended, lines, start
from tulu_mega.train import checkpoint

pytestmark = [pytest.mark.servers, pytest.mark.acceptance, pytest.mark.timeout(900)]

VERIFIER = """
from own_verifier import judge as vowels
def judge(response, ground_truth, messages=None):
    return vowels(response, ground_truth) * float(ground_truth)
"""


@pytest.fixture(scope="module")
def flags(place) -> list[str]:
    """Rows of which the third step's are worth a thousand times the others, by advantages that show it."""
    (place / "leaping_verifier.py").write_text(VERIFIER)
    rows = lines(place / "prompts.jsonl")
    rows = [row | {"ground_truth": "1000" if number // 4 == 2 else "1"} for number, row in enumerate(rows)]
    (place / "leaping.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "data.train": place / "leaping.jsonl",
        "data.shuffle": "false",
        "rewards.custom": '{"vowels" = "leaping_verifier:judge"}',
        "policy.advantages": "centred",
        "train.spike.window": 2,
        "train.straggler.every": 1,
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def skipping(place, flags) -> Path:
    ended(start(place, "skipping", *flags, "--train.spike", "skip"), place, "skipping")
    return place / "skipping"


def state_after(run: Path, step: int) -> dict[str, str]:
    (found,) = (one for one in checkpoint.find(run / "checkpoints") if one.step == step)
    files = (file for file in found.path.iterdir() if file.name not in ("training.json", ".metadata"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_update_is_left_out(skipping, place):
    steps = lines(skipping / "metrics.jsonl")
    assert [step["spikes"] for step in steps] == [0, 0, 1, 1] and [step["skipped_steps"] for step in steps] == [0] * 4
    assert "warning: update 1 of step 3: grad norm " in (place / "skipping.log").read_text()
    assert state_after(skipping, 3) == state_after(skipping, 2)
    assert state_after(skipping, 2) != state_after(skipping, 1) and state_after(skipping, 4) != state_after(skipping, 3)
    assert all(step["slowest_rank"] in (0, 1) and step["slowest_times_median"] >= 1 for step in steps)


def test_a_run_that_stops_has_saved_and_goes_on(skipping, place, flags):
    run, process = place / "stopping", start(place, "stopping", *flags, "--train.spike", "stop")
    try:
        status = process.wait(LIMIT)
    finally:
        process.kill()
    told = (place / "stopping.log").read_text()
    assert status == 2, told[-4000:]
    assert "error: stopped at update 1 of step 3: grad norm " in told and f"{run}/rollouts/step_000003.jsonl" in told
    assert len(lines(run / "metrics.jsonl")) == 3
    assert state_after(run, 3) == state_after(run, 2) == state_after(skipping, 2)
    ended(start(place, "stopping", *flags, "--train.spike", "skip"), place, "stopping")
    check_same(run, skipping)
    assert [step["spikes"] for step in lines(run / "metrics.jsonl")] == [0, 0, 1, 1]
