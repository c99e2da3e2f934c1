"""What long runs meet, in the real loop: a batch that leaps, by each policy, and a rank that is slow."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import socket
import string
import tempfile
import time
from pathlib import Path

import pytest

from tests.lib import world
from tests.lib.sft_runs import EXAMPLE, PATIENCE, arguments, expect_same, run_sft
from tulu_mega.config import SftSettings, load
from tulu_mega.errors import UserError
from tulu_mega.preflight import check
from tulu_mega.quickstart import task
from tulu_mega.train import checkpoint
from tulu_mega.train.engine import Engine

pytestmark = pytest.mark.ranks

STEPS, SPOILT, BATCH = 6, 5, 8
"""The fifth step's rows are spoilt."""
SLOW = 1
"""The rank that is."""


@pytest.fixture(scope="module")
def spoilt(material, tmp_path_factory) -> Path:
    """A model and rows, of which one batch's have an answer that is long and noise."""
    place = tmp_path_factory.mktemp("spoilt")
    (place / "model").symlink_to(material / "model")
    draw = random.Random(0)
    rows = list(itertools.islice(task.demonstrations(seed=0), STEPS * BATCH))
    for row in rows[(SPOILT - 1) * BATCH : SPOILT * BATCH]:
        row["messages"][-1]["content"] = "".join(draw.choices(string.ascii_letters, k=400))
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def settings_of(place: Path, run_dir: Path, action: str) -> SftSettings:
    flags = {
        "data.shuffle": "false",
        "optim.schedule": "constant",  # the rate is in the optimizer's state
        "optim.warmup": 0,
        "checkpoint.keep": STEPS,
        "train.log_every": 2,
        "train.spike.action": action,
        "train.spike.factor": 3,
        "train.spike.window": 3,
        "train.straggler.every": 2,
        "train.straggler.reports": 2,
    }
    more = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return load(SftSettings, str(EXAMPLE), [*arguments(place, run_dir, STEPS, every=1)[1:], *more])


def trained(settings: SftSettings, slow: int | None = None) -> tuple[str, str]:
    """Trains, one rank with four times its own work; what the rank says, and the error it ends with."""
    computes, error = Engine.forward_backward, ""

    def slowly(self, *arguments, **options):
        began = time.thread_time()
        loss = computes(self, *arguments, **options)
        end = time.thread_time() + 3 * (time.thread_time() - began)
        while time.thread_time() < end:
            pass
        return loss

    with contextlib.ExitStack() as stack:
        told = stack.enter_context(tempfile.TemporaryFile("w+"))
        stack.enter_context(contextlib.redirect_stdout(told))
        stack.enter_context(contextlib.redirect_stderr(told))
        if os.environ["RANK"] == str(slow):
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(Engine, "forward_backward", slowly)
        try:
            run_sft(settings)
        except UserError as stopped:
            error = str(stopped)
        told.seek(0)
        return told.read(), error


def run(settings: SftSettings, slow: int | None = None) -> list[tuple[str, str]]:
    check.ready(settings)
    return world.run(2, trained, settings, slow, timeout=PATIENCE)


def rows_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def state_after(run_dir: Path, step: int) -> dict[str, str]:
    """Digests of what a checkpoint holds of weights, optimizer and random states."""
    (found,) = (one for one in checkpoint.find(run_dir / "checkpoints") if one.step == step)
    files = (file for file in found.path.iterdir() if file.name not in ("training.json", ".metadata"))  # paths and times
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def skipping(spoilt, tmp_path_factory) -> tuple[Path, list[tuple[str, str]]]:
    """A run that leaves the spoilt batch out, one of its ranks being slow; its directory, and what each rank said."""
    run_dir = tmp_path_factory.mktemp("skipping") / "run"
    return run_dir, run(settings_of(spoilt, run_dir, "skip"), SLOW)


def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were(skipping):
    run_dir, (lead, other) = skipping
    assert [row["spikes"] for row in rows_of(run_dir)] == [0, 0, 0, 0, 1, 1]
    assert "warning: step 5: loss" in lead[0] and "times the median of the last 3 steps" in lead[0]
    assert lead[1] == other[1] == "" and "warning" not in other[0]
    states = [state_after(run_dir, step) for step in range(1, STEPS + 1)]
    changed = [name for name in states[0] if len({state[name] for state in states}) > 1]
    assert changed and states[4] == states[3]
    assert all(states[step] != states[step + 1] for step in (0, 1, 2, 4))


def test_a_run_that_stops_has_saved_and_goes_on_as_is_said(skipping, spoilt, tmp_path):
    run_dir = tmp_path / "run"
    for _, error in run(settings_of(spoilt, run_dir, "stop")):
        assert error.startswith("stopped before the update of step 5: loss ")
        assert "train.jsonl line 33" in error and "go on with --train.spike skip or warn" in error
    assert checkpoint.find(run_dir / "checkpoints")[-1].step == len(rows_of(run_dir)) == SPOILT - 1
    assert state_after(run_dir, 4) == state_after(skipping[0], 4)
    run(settings_of(spoilt, run_dir, "skip"))  # it knows the losses of before, and so comes to the same
    expect_same(run_dir, skipping[0])
    assert [row["spikes"] for row in rows_of(run_dir)] == [0, 0, 0, 0, 1, 1]


def test_a_slow_rank_is_named(skipping):
    run_dir, (lead, _) = skipping
    reports = [row for row in rows_of(run_dir) if "slowest_rank" in row]
    assert [row["step"] for row in reports] == [2, 4, 6]
    for row in reports:
        assert (row["slowest_rank"], row["slowest_host"]) == (SLOW, socket.gethostname())
        assert row["slowest_times_median"] > 1.5
    assert f"slowest rank {SLOW} ({socket.gethostname()})" in lead[0]
    assert lead[0].count(f"warning: step 4: rank {SLOW} on {socket.gethostname()} is slow") == 1
    assert lead[0].count("is slow") == 1
