"""What counts as a leap, what is done, and that a run which goes on judges as before."""

import json
import math

import pytest

from tulu_mega.config import SpikeSettings
from tulu_mega.resilience.spikes import Spikes

USUAL = [1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 1.0, 1.3, 1.0, 1.1]


def after(values, **settings):
    spikes = Spikes(SpikeSettings(**settings))
    assert [spikes.allow(value, 2.0) for value in values] == [True] * len(values)
    return spikes


@pytest.mark.parametrize(("action", "updated"), [("warn", True), ("skip", False), ("stop", False)])
def test_a_leap_is_met_as_wanted(action, updated):
    spikes = after(USUAL, action=action)
    assert not spikes.found and spikes.allow(10.0, 2.0) and not spikes.found  # 10 times the median is not more than that
    assert spikes.allow(10.6, 2.0) is updated
    assert spikes.found == "loss 10.6 is 10.6 times the median of the last 11 steps, 1"
    assert spikes.total == 1 and spikes.stop is (action == "stop")
    assert spikes.allow(1.0, 20.1) is updated and spikes.found.startswith("grad norm 20.1 is 10.1 times the median")


def test_nothing_is_a_leap_before_enough_is_known_or_where_nobody_looks():
    assert not after([*USUAL[:9], 1e9]).found
    assert not after([*USUAL, 1e9], factor=0).found
    assert not after([-value for value in USUAL] + [1e9]).found  # of a median below 0 there are no multiples


def test_the_window_moves_and_skipped_steps_are_not_in_it():
    spikes = after([*USUAL, *[100.0] * 6], window=10, action="warn")
    assert spikes.allow(100.0, 2.0) and not spikes.found  # the usual has become 100
    spikes = after(USUAL, action="skip")
    assert [spikes.allow(100.0, 2.0) for _ in range(60)] == [False] * 60


def test_what_is_not_watched_leaps_unseen():
    spikes = Spikes(SpikeSettings(action="skip"), signals=("grad_norm",))
    losses = [-1e6, 1e6] * 6
    assert all(spikes.allow(loss, 1.0) for loss in losses) and spikes.state == {"known": {"grad_norm": [1.0] * 12}, "total": 0}
    assert not spikes.allow(0.0, 10.5) and spikes.found.startswith("grad norm 10.5 is 10.5 times")


def test_a_run_that_goes_on_judges_as_before():
    values = [*USUAL, 30.0, 1.0, 12.0, math.pi, 55.0]
    through = Spikes(SpikeSettings(action="skip"))
    expected = [(through.allow(value, value), through.found) for value in values]
    stopped = Spikes(SpikeSettings(action="skip"))
    seen = [(stopped.allow(value, value), stopped.found) for value in values[:12]]
    resumed = Spikes(SpikeSettings(action="skip"))
    resumed.restore(json.loads(json.dumps(stopped.state)))
    assert seen + [(resumed.allow(value, value), resumed.found) for value in values[12:]] == expected
    assert resumed.state == through.state
