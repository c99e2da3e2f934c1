"""Ranks of a whole layout (TP2 x PP2 x DP2) are killed at random moments; torchrun starts all again until the run is done."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.lib import world
from tests.lib.sft_runs import EXAMPLE, arguments, expect_same, saving, steps_done
from tulu_mega.config import SftSettings, load
from tulu_mega.launch.launcher import World
from tulu_mega.preflight import check
from tulu_mega.train import checkpoint

pytestmark = [pytest.mark.alone, pytest.mark.ranks]

RANKS, PATIENCE = 8, 300
LAYOUT = ["--parallel.tensor", "2", "--parallel.pipeline", "2", "--parallel.data", "2"]


def run_sft(settings: SftSettings) -> None:
    from tulu_mega.recipes.sft import run

    rank = int(os.environ["RANK"])
    run(settings, World(rank, RANKS, rank, RANKS, 2))


def ranks_of(agent: subprocess.Popen) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(agent.pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.Error:
        return []


def pace(agent: subprocess.Popen, run_dir: Path) -> tuple[float, float]:
    """Seconds that this machine takes to start the ranks, up to their first step, and for a step."""
    began, at = time.monotonic(), []
    for steps in (1, 3):
        while steps_done(run_dir) < steps:
            assert agent.poll() is None and time.monotonic() < began + PATIENCE, f"step {steps} was not done"
            time.sleep(0.005)
        at.append(time.monotonic())
    return at[0] - began, (at[1] - at[0]) / 2


def kill_one(agent: subprocess.Popen, run_dir: Path, draw: random.Random, number: int, start: float, step: float) -> dict | None:
    """Waits for a random moment and kills a random rank; None when the run was over before."""
    where, before = draw.random(), steps_done(run_dir)
    pause = draw.uniform(0, start) if where < 0.15 else draw.uniform(0, step)  # after the last kill, or else after a step
    end = time.monotonic() + PATIENCE
    while where >= 0.15 and agent.poll() is None and steps_done(run_dir) <= before:
        assert time.monotonic() < end, "no step was done"
        time.sleep(0.005)
    paused = time.monotonic() + pause
    in_save = 0.15 <= where < 0.55
    while agent.poll() is None and (time.monotonic() < paused or (in_save and not saving(run_dir))):
        time.sleep(0.001)
    ranks = ranks_of(agent)
    if agent.poll() is not None or len(ranks) < RANKS:
        return None
    rank = draw.randrange(RANKS)
    told = {"kill": number, "rank": rank, "steps": steps_done(run_dir), "in a save": saving(run_dir)}
    ranks[rank].kill()
    end = time.monotonic() + PATIENCE
    pids = {each.pid for each in ranks}
    while agent.poll() is None and (len(now := ranks_of(agent)) < RANKS or pids & {each.pid for each in now}):
        assert time.monotonic() < end, "the ranks were not started again"
        time.sleep(0.05)
    for found in checkpoint.find(run_dir / "checkpoints"):
        assert json.loads((found.path / "training.json").read_text())["step"] == found.step
    return told


@pytest.mark.acceptance
@pytest.mark.timeout(7200)
def test_thirty_kills_at_random_moments_under_torchrun(material, tmp_path):
    wanted = int(os.environ.get("KILLS", "30"))
    steps = 2 * wanted + 8
    flags = [*arguments(material, tmp_path / "reference", steps, every=1), *LAYOUT]
    settings = load(SftSettings, str(EXAMPLE), flags[1:])
    check.ready(settings)
    world.run(RANKS, run_sft, settings, timeout=1200)

    run_dir, log, draw = tmp_path / "run", tmp_path / "torchrun.log", random.Random(30)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", str(EXAMPLE.parents[1]))}
    torchrun = [sys.executable, "-m", "tulu_mega.agent", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [*torchrun, "--max-restarts", str(wanted + 5), "-m", "tulu_mega", "sft"]
    command += [*arguments(material, run_dir, steps, every=1), *LAYOUT]
    kills = 0
    with log.open("w") as file:
        agent = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
        try:
            start, step = pace(agent, run_dir)
            while kills < wanted:
                told = kill_one(agent, run_dir, draw, kills + 1, start, step)
                if told is None and agent.poll() is not None:
                    break
                if told:
                    kills += 1
                    print(told, flush=True)
            status = agent.wait(PATIENCE * 4)
        finally:
            for process in (*ranks_of(agent), agent):
                process.kill()
    assert status == 0, log.read_text()[-5000:]
    assert kills == wanted, f"the run was over after {kills} kills"
    assert "could not be read" not in log.read_text()
    assert log.read_text().count("going on after step") >= wanted // 2
    expect_same(run_dir, tmp_path / "reference")
