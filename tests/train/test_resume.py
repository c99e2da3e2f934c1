"""A run that is killed and started again by the same command ends as if nothing had happened, to the last bit."""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launch.test_launcher import wait_until
from tests.lib import world
from tests.lib.sft_runs import EXAMPLE, PATIENCE, arguments, expect_same, run_sft, saving, steps_done, undisturbed
from tulu_mega.config import SftSettings, load
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import World
from tulu_mega.preflight import check
from tulu_mega.train import saver

pytestmark = pytest.mark.ranks


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
        self.launcher.wait(60)
        self.expect_gone()

    def kill_rank(self, number: int) -> None:
        """The launcher ends the others and says so."""
        ranks = self.ranks()
        if number >= len(ranks):  # not there yet
            return self.kill_launcher()
        ranks[number].kill()
        status = self.launcher.wait(120)
        # 0: it was about to end well. Rank 0 may tell of a neighbour that is gone before the launcher says which was killed
        assert status in (0, 128 + signal.SIGKILL), self.log.read_text()
        return self.expect_gone()

    def expect_gone(self) -> None:
        end = time.monotonic() + 60
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        commands = [(process.pid, process.cmdline()) for process in left if process.is_running()]
        for process in left:
            process.kill()
        assert not commands, f"left behind: {commands}"


def run_until_a_save(settings: SftSettings, step: int, told: Path) -> None:
    """Trains until the checkpoint of a step is all but there, says so and waits for the end."""
    places = saver.put_in_place

    def place(partial: Path, directory: Path, manifest: dict, digests: dict[str, str]) -> None:
        if manifest["step"] == step:
            told.touch()
            time.sleep(600)
        places(partial, directory, manifest, digests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "put_in_place", place)
        run_sft(settings)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_a_save_and_by_a_dying_rank(material, tmp_path):
    steps = 6
    undisturbed(material, tmp_path / "reference", steps, every=1)
    run_dir = tmp_path / "run"
    again = arguments(material, run_dir, steps, every=1)

    wanted = load(SftSettings, str(EXAMPLE), again[1:])
    check.ready(wanted)
    first = world.Started(2, run_until_a_save, wanted, 3, tmp_path / "saving")
    try:
        wait_until((tmp_path / "saving").exists, PATIENCE)
    finally:
        first.kill()
    assert saving(run_dir) and steps_done(run_dir) < steps

    second = Run(again, tmp_path / "second.log")
    assert second.wait_until(lambda: "going on after step" in second.log.read_text() and steps_done(run_dir) >= 3)
    second.kill_rank(1)
    assert second.launcher.returncode == 128 + signal.SIGKILL
    assert "error: rank 1 of 2 was killed by Killed (out of memory?)" in second.log.read_text()

    check.ready(wanted)
    world.run(2, run_sft, wanted, timeout=PATIENCE)
    expect_same(run_dir, tmp_path / "reference")
    export = run_dir / "hf/model.safetensors"
    before = (run_dir / "metrics.jsonl").read_bytes(), export.read_bytes()
    world.run(2, run_sft, wanted, timeout=PATIENCE)  # after the last step: exports, no more
    assert before == ((run_dir / "metrics.jsonl").read_bytes(), export.read_bytes())


def refused(settings: SftSettings) -> list[str]:
    """What a run of two ranks says to the user when it ends."""
    try:
        run_sft(settings)
    except UserError as error:
        return error.problems
    return []


def test_a_run_that_has_ended_is_made_longer(material, tmp_path):
    def settings(run: str, steps: int) -> SftSettings:
        flags = arguments(material, tmp_path / run, steps, every=100)[1:]
        loaded = load(SftSettings, str(EXAMPLE), [*flags, "--optim.schedule", "constant", "--optim.warmup", "0.0"])
        check.ready(loaded)
        return loaded

    for run, steps in (("reference", 4), ("run", 2), ("run", 4)):
        world.run(2, run_sft, settings(run, steps), timeout=PATIENCE)
    expect_same(tmp_path / "run", tmp_path / "reference")
    told = world.run(2, refused, settings("run", 3), timeout=PATIENCE)
    assert all(len(problems) == 1 and "has 4 steps done, the settings ask for 3" in problems[0] for problems in told)
    expect_same(tmp_path / "run", tmp_path / "reference")


def run_with_small_files(settings: SftSettings) -> list[str]:
    """What it says to the user when no file may be larger than 100 kB."""
    from tulu_mega.recipes.sft import run

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        run(settings, World(0, 1, 0, 1, 1))
    except UserError as error:
        return error.problems
    return []


def test_a_full_disk_ends_the_command_with_a_message(material, tmp_path):
    """A limit on the size of files stands in for it: the data fits, a checkpoint does not."""
    argv = [*arguments(material, tmp_path / "run", steps=2, every=1), "--parallel.tensor", "1"]
    settings = load(SftSettings, str(EXAMPLE), argv[1:])
    check.ready(settings)
    [told] = world.run(1, run_with_small_files, settings, timeout=PATIENCE)
    place = tmp_path / "run/checkpoints"
    assert len(told) == 1 and f"checkpoint of step 1 could not be written to {place}: File too large" in told[0]
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
