"""`tulu-mega ppo` killed at one moment of a step after another: it goes on to the last bit, under equal and other layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.test_ppo import flags
from tests.lib import killing
from tests.lib.grpo_runs import check_same, lines, start, weights

pytestmark = [pytest.mark.servers, pytest.mark.acceptance, pytest.mark.timeout(3600)]

ENGINE, SAVE = "tulu_mega.train.engine:Engine", "tulu_mega.train.sharded_save:ShardedSave.write"
MOMENTS = [
    (1, "tulu_mega.rl.collector:Collector.collect", "", 1),  # rollouts, of the rank that waits for them
    (0, "tulu_mega.rl.fleet:FleetClient.generate", "", 1),  # of the rank that asks for them
    (0, "tulu_mega.rl.judging:Rewards.finish", "", 2),  # judging
    (1, f"{ENGINE}.score", "value", 2),  # values before the updates
    (0, f"{ENGINE}.forward_backward", "value", 1),  # the value model's update
    (1, f"{ENGINE}.optimizer_step", "value", 2),
    (0, f"{ENGINE}.forward_backward", "policy", 2),  # the policy's, in the second pass
    (1, f"{ENGINE}.optimizer_step", "policy", 1),
    (0, "tulu_mega.rl.fleet:Fleet.push", "", 2),  # weights to the servers
    (1, SAVE, "", 1),  # the policy's part of a checkpoint
    (0, SAVE, "", 2),  # the value model's
    (0, "tulu_mega.train.checkpoint:put_in_place", "", 1),  # before it counts
    (1, "tulu_mega.train.session:Session.export", "", 2),  # the value model's export
]
"""Rank, what it begins, whose, which call since it was started."""
OWN = ["--value.parallel.tensor", "1", "--value.parallel.data", "2"]


@pytest.mark.parametrize("own", [[], OWN], ids=["one layout", "a layout of its own"])
def test_killed_at_each_moment_of_a_step(place, served, own):
    name = f"ppo_{'own' if own else 'one'}"
    for run, variables in ((name, {}), (f"{name}_killed", moments(place, name))):
        more = ["--restarts", str(len(MOMENTS))] if variables else []
        process = start(place, run, *more, *flags(place, served), *own, stage="ppo", **served[1], **variables)
        try:
            status = process.wait(1500)
        finally:
            process.kill()
        assert status == 0, (place / f"{run}.log").read_text()[-4000:]
    past = (place / f"{name}.moments").read_text().split("\n")[:-1]
    assert past == [f"{what} {whose}" for _, what, whose, _ in MOMENTS]
    killed, undisturbed = place / f"{name}_killed", place / name
    check_same(killed, undisturbed, figures=("kl_reward", "value_loss", "value_grad_norm", "explained_variance", "value_lr"))
    ours, theirs = weights(killed / "hf_value"), weights(undisturbed / "hf_value")
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    if own:  # a layout changes rounding alone
        first, other = (lines(place / run / "metrics.jsonl")[0] for run in (name, "ppo_one"))
        for figure in ("value_loss", "value_grad_norm", "returns", "explained_variance"):
            assert first[figure] == pytest.approx(other[figure], rel=1e-4, abs=1e-5)


def moments(place: Path, name: str) -> dict[str, str]:
    """Environment variables of a run that is killed."""
    return {
        "PYTHONPATH": f"{Path(killing.__file__).parent}:{place}",
        "KILL_MOMENTS": json.dumps(MOMENTS),
        "KILL_STATE": str(place / f"{name}.moments"),
    }
