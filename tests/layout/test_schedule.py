"""The simulation against what can be said without it, and the packer's use of it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.bench_packing import CASES, compare, tulu_lengths
from tulu_mega.data.packing import plan_step
from tulu_mega.errors import UserError
from tulu_mega.layout.alignment import Alignment
from tulu_mega.layout.schedule import Pipeline, makespan, shortest_order, simulate, stage_shares

costs = st.floats(0.1, 10)


@st.composite
def steps(draw):
    """Passes of any cost: forward and backward by micro-batch and virtual stage, ranks, chunks."""
    ranks, chunks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    count = draw(st.integers(1, 3)) * ranks if chunks > 1 else draw(st.integers(1, 9))
    table = st.lists(st.lists(costs, min_size=ranks * chunks, max_size=ranks * chunks), min_size=count, max_size=count)
    return draw(table), draw(table), ranks, chunks


@settings(max_examples=150, deadline=None)
@given(steps())
def test_no_shorter_than_any_ranks_work_nor_any_micro_batchs_way_through(step):
    forward_MS, backward_MS, ranks, chunks = step
    took = makespan(forward_MS, backward_MS, ranks, chunks)
    passes = np.array(forward_MS) + np.array(backward_MS)
    for rank in range(ranks):
        assert took >= passes[:, rank::ranks].sum() * (1 - 1e-9)
    assert took >= passes.sum(axis=1).max() * (1 - 1e-9)  # forward through all stages, then back
    assert took <= passes.sum() * (1 + 1e-9)  # somebody always works
    assert makespan(np.multiply(forward_MS, 3), np.multiply(backward_MS, 3), ranks, chunks) == pytest.approx(3 * took)


@settings(max_examples=50, deadline=None)
@given(ranks=st.integers(1, 6), chunks=st.integers(1, 3), rounds=st.integers(1, 4))
def test_equal_micro_batches_have_the_bubble_of_the_formula(ranks, chunks, rounds):
    """(PP - 1) / VPP micro-batches of filling and draining (Narayanan et al., arXiv 2104.04473)."""
    count = rounds * ranks
    pipeline = Pipeline(ranks, chunks if ranks > 1 else 1)
    simulation = simulate([[1.0] * count], pipeline)
    bubble = (ranks - 1) / pipeline.chunks
    assert simulation.makespan == pytest.approx((count + bubble) / ranks)
    assert simulation.busy == pytest.approx(count / (count + bubble))


def test_two_stages_by_hand():
    """Rank 0: F0 F1 . . B0 . . B1; rank 1 waits for F0, then F0 B0 F1 B1 (forward 1, backward 2)."""
    assert makespan([[1, 1]] * 2, [[2, 2]] * 2, ranks=2) == 1 + 2 * 3 + 2
    assert Pipeline(2).makespan([6, 6]) == 9
    assert Pipeline(2).makespan([]) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(costs, min_size=4, max_size=4), min_size=1, max_size=4))
def test_replicas_wait_for_the_slowest(costs_RM):
    alone = [simulate([costs_M], Pipeline()).makespan for costs_M in costs_RM]
    together = simulate(costs_RM, Pipeline())
    assert together.makespan == max(alone)
    assert together.busy == pytest.approx(sum(alone) / len(alone) / max(alone))
    assert simulate([[2.0, 2.0]] * 3, Pipeline()).busy == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(costs, min_size=1, max_size=9), st.integers(1, 5))
def test_the_order_is_a_permutation_and_no_worse_than_the_costliest_first(costs_M, ranks):
    pipeline = Pipeline(ranks)
    order = shortest_order(costs_M, pipeline)
    assert sorted(order) == list(range(len(costs_M)))
    falling = sorted(costs_M, reverse=True)
    assert pipeline.makespan([costs_M[index] for index in order]) <= pipeline.makespan(falling) * (1 + 1e-9)
    if ranks == 1:
        assert [costs_M[index] for index in order] == falling


def test_shares_put_the_head_on_the_last_stage():
    assert stage_shares([2, 2], layer=1.0, head=2.0) == (1 / 3, 2 / 3)
    uneven = Pipeline(2, shares=(1 / 3, 2 / 3))
    assert uneven.makespan([9] * 10) > Pipeline(2).makespan([9] * 10)
    with pytest.raises(ValueError, match="3 shares for 2"):
        Pipeline(2, shares=(1.0, 1.0, 1.0))


def test_numbers_the_interleaved_schedule_cannot_run_are_refused():
    with pytest.raises(ValueError, match="multiples of 4 micro-batches, not 6"):
        Pipeline(4, 2).makespan([1.0] * 6)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), max_size=30), ranks=st.integers(1, 3), multiple=st.integers(1, 4))
def test_the_packer_keeps_to_multiples(lengths, ranks, multiple):
    pipeline = Pipeline(multiple, 2 if multiple > 1 else 1)
    plan = plan_step(lengths, ranks, 100, Alignment(), multiple=multiple, pipeline=pipeline)
    assert len({len(rank) for rank in plan}) == 1 and len(plan[0]) % multiple == 0
    assert sorted(index for rank in plan for members in rank for index in members) == list(range(len(lengths)))
    assert len(plan[0]) - multiple < max(1, len(plan_step(lengths, ranks, 100, Alignment())[0]))


def test_a_number_that_is_no_multiple_is_refused_with_one_that_is():
    with pytest.raises(UserError, match=r"train\.micro_batches = 5 is not a multiple of 4.*set train\.micro_batches to 8"):
        plan_step([3] * 20, 1, 100, Alignment(), 5, multiple=4)
    with pytest.raises(UserError, match="it takes 8; "):
        plan_step([60] * 6, 1, 100, Alignment(), 4, multiple=4)


def test_the_lengths_are_tulus():
    lengths = tulu_lengths(100_000, seed=1)
    assert np.median(lengths) == pytest.approx(400, rel=0.02)
    assert np.mean(lengths) == pytest.approx(550, rel=0.02)
    assert np.percentile(lengths, 95) == pytest.approx(1800, rel=0.03)
    assert 3500 < lengths.max() <= 4096


@pytest.mark.parametrize("case", CASES)
def test_packs_of_tulus_lengths_run_as_equal_ones_would(case):
    ratios = compare(case, tulu_lengths(128 * 100, seed=2)).ratios
    assert max(ratios) <= 1.05
    assert math.fsum(ratios) / len(ratios) <= 1.01
