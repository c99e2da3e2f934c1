"""Who is told to be slow, and what a rank's own time is."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tulu_mega.config import StragglerSettings
from tulu_mega.resilience import work_time
from tulu_mega.resilience.stragglers import Lineup, Slowest
from tulu_mega.resilience.work_time import CpuClock, TimedProduct, WorkTime

SECONDS = st.floats(0.001, 1000)


def lineup(alike, **settings):
    return Lineup(StragglerSettings(**settings), [f"node{rank // 2}" for rank in range(len(alike))], alike)


def test_the_slowest_is_named_with_its_host_and_distance():
    slowest = lineup([0, 0, 0, 0]).slowest([WorkTime(1.0, 0.0), WorkTime(1.2, 0.0), WorkTime(1.5, 0.3), WorkTime(1.1, 0.0)])
    assert (slowest.rank, slowest.host, slowest.warnings) == (2, "node1", [])
    assert slowest.times == pytest.approx(1.8 / 1.1) and slowest.waiting == pytest.approx(0.3 / 1.8)
    assert slowest.figures == {"slowest_rank": 2, "slowest_host": "node1", "slowest_times_median": slowest.times}


def test_the_console_hears_only_of_a_rank_that_is_notably_behind():
    assert Slowest(2, "node1", 1.1, 0.0).remark == "slowest rank 2 (node1) 1.10x"
    assert Slowest(2, "node1", 1.09, 0.0).remark == ""


def test_of_two_ranks_the_faster_is_the_yardstick():
    assert lineup([0, 0]).slowest([WorkTime(3.0, 0.0), WorkTime(1.0, 0.0)]).times == 3.0


def test_only_ranks_of_the_same_work_are_compared():
    slowest = lineup([0, 1, 0, 1]).slowest([WorkTime(1.0, 0.0), WorkTime(9.0, 0.0), WorkTime(1.3, 0.0), WorkTime(9.9, 0.0)])
    assert slowest.rank == 2 and slowest.times == pytest.approx(1.3)
    slowest = lineup([0, 1, 1]).slowest([WorkTime(99.0, 0.0), WorkTime(1.0, 0.0), WorkTime(1.1, 0.0)])
    assert slowest.rank == 2
    assert lineup([0, 1]).slowest([WorkTime(1.0, 0.0), WorkTime(9.0, 0.0)]) is None
    assert lineup([0, 0]).slowest([WorkTime(0.0, 0.0)] * 2) is None  # nothing was learned in these steps


def test_a_rank_is_warned_of_after_reports_in_a_row_and_every_so_many_after():
    ranks = lineup([0, 0, 0], factor=1.5, reports=2)
    even, slow = [WorkTime(1.0, 0.0)] * 3, [WorkTime(1.0, 0.0), WorkTime(1.0, 0.0), WorkTime(0.9, 0.7)]
    told = [ranks.slowest(times).warnings for times in (slow, even, slow, slow, slow, slow)]
    assert [len(each) for each in told] == [0, 0, 0, 1, 0, 1]
    assert told[3] == [
        "rank 2 on node1 is slow: 1.60 times the median of the ranks that do the same, in 2 reports in a row "
        "(train.straggler.factor = 1.5); 44% of its time it waited for a CPU, which something else uses"
    ]
    assert "in 4 reports in a row" in told[5][0]
    both = lineup([0, 0, 0, 1, 1], reports=1).slowest([*even, WorkTime(1.0, 0.0), WorkTime(4.0, 0.0)])
    assert [each.split(" is slow")[0] for each in both.warnings] == ["rank 4 on node2"]


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=2, max_size=20), st.floats(0.01, 100))
def test_nobody_is_behind_by_less_than_one_and_units_do_not_matter(spent, unit):
    times = [WorkTime(*each) for each in spent]
    slowest = lineup([0] * len(times)).slowest(times)
    assert slowest.times >= 1 and sum(times[slowest.rank]) == max(map(sum, times))
    scaled = lineup([0] * len(times)).slowest([WorkTime(unit * work, unit * wait) for work, wait in times])
    assert scaled.times == pytest.approx(slowest.times)


def burn(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_only_work_in_the_block_is_counted_and_no_sleep():
    clock = CpuClock()
    burn(0.05)
    with clock.working():
        burn(0.05)
    with clock.working():
        burn(0.05)
    burnt = clock.look()()
    with clock.working():
        time.sleep(0.2)
    assert burnt.working >= 0.1 > clock.look()().working
    assert clock.look()() == WorkTime(0.0, 0.0)


def test_waiting_for_a_cpu_is_the_second_number_of_schedstat(tmp_path, monkeypatch):
    file = tmp_path / "schedstat"
    monkeypatch.setattr(work_time, "_SCHEDSTAT", file)
    clock = CpuClock()
    file.write_text("7 1000000000 3\n")
    with clock.working():
        file.write_text("9 3500000000 4\n")
    assert clock.look()().waiting == 2.5
    file.unlink()
    with clock.working():
        pass
    assert clock.look()().waiting == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_timed_product_takes_time_and_leaves_random_states_alone():
    before = torch.cuda.get_rng_state()
    product = TimedProduct(torch.device("cuda", 0))
    with product.working():
        pass
    taken = [product.look()() for _ in range(3)]
    assert all(time.working > 0 and time.waiting == 0 for time in taken)
    assert torch.equal(torch.cuda.get_rng_state(), before)
