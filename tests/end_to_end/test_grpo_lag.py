"""`tulu-mega grpo` and `ppo` whose servers answer while a step trains: the same bits twice, killed anywhere, asked to end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.test_ppo import flags as ppo_flags
from tests.lib import killing
from tests.lib.grpo_runs import LIMIT, STEPS, after, check_same, ended, lines, processes_of, start
from tulu_mega.errors import Stopped

pytestmark = [pytest.mark.servers, pytest.mark.acceptance, pytest.mark.timeout(1800)]

LAG = ("--train.max_policy_lag", "1")
SAVE = "tulu_mega.train.sharded_save:ShardedSave.write"
MOMENTS = [
    (0, "tulu_mega.rl.scheduler:Scheduler.quiet", "", 2),  # the rank that asks, before the weights change
    (1, "tulu_mega.train.engine:Engine.optimizer_step", "policy", 2),
    (0, "tulu_mega.rl.under_way:restore", "", 1),
    (0, "tulu_mega.rl.judging:Rewards.begin", "", 2),  # with one answer of the next step
    (0, "tulu_mega.rl.fleet:FleetClient.attempt", "", 1),  # as servers are asked for the next step
    (1, "tulu_mega.rl.collector:Collector.quiet", "", 2),  # the rank that waits for it
    (0, "tulu_mega.rl.under_way:files", "", 2),
    (1, SAVE, "", 1),
    (0, "tulu_mega.train.checkpoint:put_in_place", "", 1),  # before a checkpoint counts
    (0, "tulu_mega.rl.fleet:Fleet.push", "", 2),
    (1, "tulu_mega.train.session:Session.export", "", 1),
]
"""Rank, what it begins, whose, which call since it was started."""


@pytest.fixture(scope="module")
def pipelined(place, served) -> Path:
    """The directory of a run that nothing happened to."""
    flags, variables = served
    ended(start(place, "pipelined", *LAG, *flags, **variables), place, "pipelined")
    return place / "pipelined"


def lags(run: Path) -> list[set[int]]:
    """Of each step, by how many steps the weights of its responses are older."""
    return [{step - 1 - one["version"] for one in lines(run / f"rollouts/step_{step:06}.jsonl")} for step in range(1, STEPS + 1)]


def test_each_step_trains_on_responses_of_the_weights_before(pipelined, undisturbed):
    assert lags(pipelined) == [{0}, *[{1}] * (STEPS - 1)]
    steps = lines(pipelined / "metrics.jsonl")
    assert [step["policy_lag"] for step in steps] == [step["policy_lag_max"] for step in steps] == [0, *[1] * (STEPS - 1)]
    assert steps[0]["effective_samples"] == pytest.approx(1, abs=1e-6)
    assert all(0 < step["effective_samples"] < 0.9999 for step in steps[1:])  # by weights that have moved since
    assert all(step["ratio"] == 1.0 for step in steps)  # to the weights before the step
    places = [
        {one["place"] for one in lines(run / f"rollouts/step_{n:06}.jsonl")} for run in (pipelined, undisturbed) for n in (1, 2)
    ]
    assert places[:2] == places[2:]
    first = "rollouts/step_000001.jsonl"
    assert (pipelined / first).read_text() == (undisturbed / first).read_text()


def test_the_same_command_gives_the_same_bits(pipelined, place, served):
    """Though the ranks are slower by a multiple of a generation."""
    flags, variables = served
    (place / "slow").mkdir()
    (place / "slow/sitecustomize.py").write_text(SLOW)
    variables = {**variables, "PYTHONPATH": f"{place}/slow:{place}"}
    ended(start(place, "pipelined_again", *LAG, *flags, **variables), place, "pipelined_again")
    check_same(place / "pipelined_again", pipelined, figures=("kl", "policy_lag", "effective_samples"))


SLOW = """
import importlib.util, sys, time


class Slow:
    def find_spec(self, name, path=None, target=None):
        if name != "tulu_mega.rl.learner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            learn = module.Learner.learn
            module.Learner.learn = lambda *given: (time.sleep(3), learn(*given))[1]

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Slow())
"""


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_killed_at_each_moment(place, served, stage):
    name, (attached, variables) = f"lag_{stage}", served
    own = ppo_flags(place, served) if stage == "ppo" else attached
    ended(start(place, name, *LAG, *own, stage=stage, **variables), place, name)
    kills = {
        "PYTHONPATH": f"{Path(killing.__file__).parent}:{place}",
        "KILL_MOMENTS": json.dumps(MOMENTS),
        "KILL_STATE": str(place / f"{name}.moments"),
    }
    killed = f"{name}_killed"
    process = start(place, killed, "--restarts", str(len(MOMENTS)), *LAG, *own, stage=stage, **variables, **kills)
    try:
        status = process.wait(1500)
    finally:
        process.kill()
    assert status == 0, (place / f"{killed}.log").read_text()[-4000:]
    past = (place / f"{name}.moments").read_text().split("\n")[:-1]
    assert past == [f"{what} {whose}" for _, what, whose, _ in MOMENTS]
    check_same(place / killed, place / name, figures=("policy_lag", "effective_samples"))


def test_a_run_that_is_asked_to_end_goes_on(pipelined, place, served):
    flags, variables = served
    process = start(place, "pipelined_stopped", *LAG, *flags, **variables)
    try:
        after(process, place / "pipelined_stopped", 1)
        process.terminate()
        status = process.wait(LIMIT)
    finally:
        process.kill()
    assert status == Stopped.status, (place / "pipelined_stopped.log").read_text()[-4000:]
    assert len(lines(place / "pipelined_stopped/metrics.jsonl")) < STEPS
    ended(start(place, "pipelined_stopped", *LAG, *flags, **variables), place, "pipelined_stopped")
    check_same(place / "pipelined_stopped", pipelined, figures=("kl", "policy_lag"))


def test_a_server_that_dies_is_asked_again(place):
    """By the newest weights, where none is left that has those which began; nothing is lost, and the bound holds."""
    process = start(place, "lag_lost", *LAG, "--rollout.request_timeout", "60", "--rollout.update_timeout", "30")
    run = place / "lag_lost"
    try:
        after(process, run, 1)
        keeper = psutil.Process(json.loads((run / "servers/server_0.json").read_text())["pid"])
        os.kill(keeper.pid, 9)
    finally:
        ended(process, place, "lag_lost")
    assert "started again" in (place / "lag_lost.log").read_text()
    assert all(each <= {0, 1} for each in lags(run))
    places = [one["place"] for step in range(1, STEPS + 1) for one in lines(run / f"rollouts/step_{step:06}.jsonl")]
    assert sorted(places) == sorted(place for place in range(4 * STEPS) for _ in range(4))
    assert not processes_of(run)
