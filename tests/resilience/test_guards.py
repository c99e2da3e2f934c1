"""Each guard through the one object that both training loops use, and what a checkpoint keeps of them."""

from __future__ import annotations

import json
import math
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.lib import world
from tulu_mega.config import PolicyTrainSettings, TrainSettings
from tulu_mega.errors import UserError
from tulu_mega.resilience.guards import Guards
from tulu_mega.resilience.spikes import SIGNALS

pytestmark = pytest.mark.ranks

USUAL = [1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 1.0, 1.3, 1.0, 1.1]
CPU = torch.device("cpu")


class Marks:
    """A watchdog that only remembers its marks."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def step(self, number: int) -> None:
        self.steps.append(number)


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """A world of one rank: nobody is slower than itself, and a stop signal is met by all ranks."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('world') / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def guards_of(place, lead=True, signals=SIGNALS, settings=TrainSettings, **values) -> Guards:
    return Guards(settings(**values), Marks(), CPU, 0, lead, place / "logs" / "skipped.jsonl", signals)


def update(guards: Guards, step: int, loss: float, norm: float = 2.0, name: str = "") -> tuple[bool, str]:
    """As a loop does it: whether an update is applied, and the spike that ends the run."""
    finite = math.isfinite(loss) and math.isfinite(norm)
    applied = finite and guards.allow(loss, norm)
    return applied, guards.after_update(step, finite, loss, norm, lambda: [{"row": step}], name)


def test_a_step_is_marked_for_the_watchdog(tmp_path):
    guards = guards_of(tmp_path)
    guards.before_step(7)
    assert guards._watchdog.steps == [7]


@pytest.mark.parametrize(("action", "applied", "ends"), [("warn", True, False), ("skip", False, False), ("stop", False, True)])
def test_a_spike_is_met_as_wanted(tmp_path, capfd, action, applied, ends):
    guards = guards_of(tmp_path, spike={"action": action})
    assert all(update(guards, step, loss) == (True, "") for step, loss in enumerate(USUAL, 1))
    spike = "loss 20 is 20.0 times the median of the last 10 steps, 1"
    assert update(guards, 11, 20.0) == (applied, spike if ends else "")
    warning = "" if ends else f"warning: step 11: {spike}\n"
    assert capfd.readouterr().err == warning
    assert update(guards, 12, 1.0) == (True, "")  # a spike is told once
    assert guards.after_step(12).figures == {"skipped_steps": 0, "spikes": 1}
    guards.uncount_spike()
    assert guards.state["spikes"]["total"] == 0


def test_only_rank_0_warns_and_of_the_update_by_its_name(tmp_path, capfd):
    for lead in (True, False):
        guards = guards_of(tmp_path, lead, spike={"window": 2})
        for step in (1, 2):
            update(guards, step, 1.0)
        update(guards, 3, 99.0, name="update 2 of step 3")
    assert capfd.readouterr().err.splitlines() == [
        "warning: update 2 of step 3: loss 99 is 99.0 times the median of the last 2 steps, 1"
    ]


def test_a_policys_loss_may_leap(tmp_path):
    guards = guards_of(tmp_path, signals=("grad_norm",), settings=PolicyTrainSettings, spike={"action": "skip", "window": 2})
    assert [update(guards, step, loss)[0] for step, loss in enumerate([1e-6, -1e-6, 1e6], 1)] == [True] * 3
    assert update(guards, 4, 0.0, norm=99.0) == (False, "")


def test_updates_that_are_not_finite_are_counted_written_and_end_the_run(tmp_path):
    guards, other = guards_of(tmp_path, max_skipped=2), guards_of(tmp_path / "other", lead=False, max_skipped=2)
    for each in (guards, other):
        assert update(each, 1, math.nan) == (False, "") and update(each, 2, 1.0) == (True, "")
        assert update(each, 3, 1.0, norm=math.inf) == (False, "")
        assert each.after_step(3).figures == {"skipped_steps": 2, "spikes": 0}
        with pytest.raises(UserError, match="stopped at step 4: loss or gradient was not finite in 2 steps in a row"):
            update(each, 4, math.nan)
    rows = [json.loads(line) for line in (tmp_path / "logs/skipped.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["rows"]) for row in rows] == [
        (1, "nan", [{"row": 1}]), (3, "1.0", [{"row": 3}]), (4, "nan", [{"row": 4}])
    ]  # fmt: skip
    assert not (tmp_path / "other").exists()


def test_a_signal_is_noted_while_entered_and_asks_to_stop(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with guards_of(tmp_path) as guards:
        assert not guards.stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert guards.stop_requested()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_resumed_run_is_guarded_as_if_it_had_never_stopped(tmp_path):
    losses = [*USUAL, 30.0, math.nan, 1.0, 12.0, math.nan, 55.0]
    settings = {"spike": {"action": "skip"}, "max_skipped": 3}
    through = guards_of(tmp_path, **settings)
    expected = [update(through, step, loss) for step, loss in enumerate(losses, 1)]
    stopped, resumed = guards_of(tmp_path, **settings), guards_of(tmp_path, **settings)
    seen = [update(stopped, step, loss) for step, loss in enumerate(losses[:12], 1)]
    kept = json.loads(json.dumps(stopped.state))
    assert set(kept) == {"skipped", "skipped_in_a_row", "finite_updates", "spikes"} and kept["skipped_in_a_row"] == 1
    resumed.restore(kept | {"prompts": {"place": 3}})
    assert seen + [update(resumed, step, loss) for step, loss in enumerate(losses[12:], 13)] == expected
    assert resumed.state == through.state and resumed.after_step(16) == through.after_step(16)


def test_a_checkpoint_of_before_there_were_spikes_is_restored(tmp_path):
    guards = guards_of(tmp_path)
    guards.restore({"skipped": 3, "skipped_in_a_row": 1})
    spikes = guards_of(tmp_path).state["spikes"]
    assert guards.state == {"skipped": 3, "skipped_in_a_row": 1, "finite_updates": 1, "spikes": spikes}


def reports(place) -> list:
    """Two steps of a rank, the second of which works ten times as long as the first; rank 0's reports have all of it."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    guards = guards_of(place, lead=rank == 0, straggler={"every": 2, "reports": 1})
    found = []
    for step in (1, 2):
        with guards.working():
            end = time.thread_time() + (0.4 if rank == 1 else 0.04)
            while time.thread_time() < end:
                pass
        found.append(guards.after_step(step))
    dist.destroy_process_group()
    return found


def test_a_slow_rank_is_in_the_report_when_one_is_due(tmp_path):
    lead, other = world.run(2, reports, tmp_path)
    nothing = {"skipped_steps": 0, "spikes": 0}
    assert [each.figures for each in (lead[0], *other)] == [nothing] * 3
    report = lead[1]
    assert list(report.figures) == ["skipped_steps", "spikes", "slowest_rank", "slowest_host", "slowest_times_median"]
    assert report.figures["slowest_rank"] == 1 and report.figures["slowest_times_median"] > 2
    assert report.remark.startswith("slowest rank 1 (") and len(report.warnings) == 1
