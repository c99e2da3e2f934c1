"""A run that is killed and started again by the same command ends as if nothing had happened, to the last bit."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.distributed import world
from tulu_mega import preflight
from tulu_mega.config import SftSettings, load
from tulu_mega.launcher import World
from tulu_mega.quickstart import task, tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples/sft_tiny.toml"
PATIENCE = 180
"""Seconds; a start takes some 20 of them where four processes import torch on two cores."""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resume")
    tiny_model.make(directory / "model", seed=0)
    rows = itertools.islice(task.demonstrations(seed=0), 48)
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def arguments(material: Path, run_dir: Path, steps: int, every: int) -> list[str]:
    values = {
        "run_dir": run_dir,
        "model.path": material / "model",
        "data.train": material / "train.jsonl",
        "train.steps": steps,
        "train.global_batch": 8,
        "checkpoint.every": every,
    }
    return [str(EXAMPLE), *(text for name, value in values.items() for text in (f"--{name}", str(value)))]


def run_sft(settings: SftSettings) -> None:
    from tulu_mega.recipes.sft import run

    rank = int(os.environ["RANK"])
    run(settings, World(rank, 2, rank, 2, 1))


def undisturbed(material: Path, run_dir: Path, steps: int, every: int) -> None:
    """The run without a launcher, on the tests' ranks."""
    settings = load(SftSettings, str(EXAMPLE), arguments(material, run_dir, steps, every)[1:])
    preflight.ready(settings)
    world.run(2, run_sft, settings, timeout=PATIENCE)


def outcome(run_dir: Path) -> tuple[list[tuple[int, float, float]], dict[str, str]]:
    """Step, loss and gradient norm of every step; digests of the exported files."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (run_dir / "hf").iterdir()}
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows], files


class Run:
    """A started command and everything that descends from it, known by a mark in its environment."""

    def __init__(self, arguments: list[str], log: Path):
        self.mark = uuid.uuid4().hex
        self.log = log
        env = os.environ | {"OMP_NUM_THREADS": "1", "TEST_MARK": self.mark, "PYTHONPATH": str(EXAMPLE.parents[1])}
        command = [sys.executable, "-m", "tulu_mega", "sft", *arguments]
        with log.open("w") as file:
            self.launcher = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.launcher.pid).children() if "tulu_mega" in p.cmdline()]

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Whether it came true while the run went on."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.launcher.poll() is not None:
                return False
            assert time.monotonic() < end, f"nothing happened for {PATIENCE} s\n{self.log.read_text()}"
            time.sleep(0.001)
        return True

    def finish(self) -> None:
        status = self.launcher.wait(PATIENCE)
        assert status == 0, self.log.read_text()
        self.expect_gone()

    def kill_launcher(self) -> None:
        self.launcher.kill()
        self.launcher.wait(10)
        self.expect_gone()

    def kill_rank(self, number: int) -> None:
        """The launcher ends the others and says so."""
        ranks = self.ranks()
        if number >= len(ranks):  # not there yet
            return self.kill_launcher()
        ranks[number].kill()
        status = self.launcher.wait(30)
        # 0: it was about to end well. Rank 0 may tell of a neighbour that is gone before the launcher says which was killed
        assert status in (0, 128 + signal.SIGKILL), self.log.read_text()
        return self.expect_gone()

    def expect_gone(self) -> None:
        end = time.monotonic() + 15
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        commands = [(process.pid, process.cmdline()) for process in left if process.is_running()]
        for process in left:
            process.kill()
        assert not commands, f"left behind: {commands}"


def steps_done(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("*.partial-*"))


def expect_same(run_dir: Path, reference: Path) -> None:
    assert outcome(run_dir) == outcome(reference)
    assert not saving(run_dir) and not list(run_dir.glob(".*.partial*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_a_save_and_by_a_dying_rank(material, tmp_path):
    steps = 6
    undisturbed(material, tmp_path / "reference", steps, every=1)
    run_dir = tmp_path / "run"
    again = arguments(material, run_dir, steps, every=1)

    first = Run(again, tmp_path / "first.log")
    assert first.wait_until(lambda: steps_done(run_dir) >= 2 and saving(run_dir))
    first.kill_launcher()
    assert steps_done(run_dir) < steps

    second = Run(again, tmp_path / "second.log")
    assert second.wait_until(lambda: "going on after step" in second.log.read_text() and steps_done(run_dir) >= 3)
    second.kill_rank(1)
    assert second.launcher.returncode == 128 + signal.SIGKILL
    assert "error: rank 1 of 2 was killed by Killed (out of memory?)" in second.log.read_text()

    Run(again, tmp_path / "third.log").finish()
    expect_same(run_dir, tmp_path / "reference")
    export = run_dir / "hf/model.safetensors"
    before = (run_dir / "metrics.jsonl").read_bytes(), export.read_bytes()
    world.run(2, run_sft, load(SftSettings, str(EXAMPLE), again[1:]), timeout=PATIENCE)  # after the last step: exports, no more
    assert before == ((run_dir / "metrics.jsonl").read_bytes(), export.read_bytes())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("prlimit"), reason="needs util-linux's prlimit")
def test_a_full_disk_ends_the_command_with_a_message(material, tmp_path):
    """A limit on the size of files stands in for it: the data fits, a checkpoint does not."""
    argv = [*arguments(material, tmp_path / "run", steps=2, every=1), "--parallel.tensor", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parents[1])}
    limited = ["prlimit", "--fsize=100000", sys.executable, "-m", "tulu_mega", "sft", *argv]
    done = subprocess.run(limited, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    place = tmp_path / "run/checkpoints"
    assert f"error: checkpoint of step 1 could not be written to {place}: File too large" in done.stderr
    assert list(place.iterdir()) == []


def wait_for_a_moment(run: Run, run_dir: Path, draw: random.Random) -> bool:
    """Any moment: while the command starts, in a step, in a save. False when the run was over before."""
    where, before = draw.random(), steps_done(run_dir)
    pause = draw.uniform(0, 20) if where < 0.15 else draw.uniform(0, 3)
    if where >= 0.15 and not run.wait_until(lambda: steps_done(run_dir) not in (0, before)):
        return False
    end = time.monotonic() + pause
    if not run.wait_until(lambda: time.monotonic() > end):
        return False
    return not 0.15 <= where < 0.55 or run.wait_until(lambda: saving(run_dir))


@pytest.mark.acceptance
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments(material, tmp_path):
    draw = random.Random(20)
    steps, kills, runs, inside = 30, 0, 0, 0
    undisturbed(material, tmp_path / "reference", steps, every=1)
    while kills < 20:
        runs += 1
        run_dir = tmp_path / f"run_{runs}"
        again = arguments(material, run_dir, steps, every=draw.choice([1, 2]))
        for attempt in itertools.count():
            current = Run(again, tmp_path / f"{runs}_{attempt}.log")
            if kills == 20 or attempt == 7 or not wait_for_a_moment(current, run_dir, draw):
                current.finish()
                break
            inside += saving(run_dir)
            rank = draw.choice([None, 0, 1])
            if rank is None:
                current.kill_launcher()
            else:
                current.kill_rank(rank)
            kills += 1
            print(f"kill {kills}: {'launcher' if rank is None else f'rank {rank}'}, {steps_done(run_dir)} steps done", flush=True)
        expect_same(run_dir, tmp_path / "reference")
    print(f"{kills} kills over {runs} runs, {inside} of them within a save")
    assert inside >= 5
