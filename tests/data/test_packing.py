"""The planner's invariants, as its docstring lists them."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega.data.packing import plan_step
from tulu_mega.errors import UserError
from tulu_mega.layout.alignment import Alignment, alignment
from tulu_mega.layout.cost import sequence_flops

FLOPS = sequence_flops(hidden=64, ffn=128, layers=2)

layouts = st.builds(
    alignment,
    tensor=st.sampled_from([1, 2, 4]),
    sequence_parallel=st.booleans(),
    context=st.sampled_from([1, 2]),
    fp8=st.sampled_from([None, "delayed"]),
)


@pytest.mark.parametrize(
    ("layout", "sequence", "total"),
    [
        ({}, 1, 1),
        ({"tensor": 4}, 1, 1),
        ({"tensor": 4, "sequence_parallel": True}, 1, 4),
        ({"context": 2}, 4, 4),
        ({"context": 3, "tensor": 4, "sequence_parallel": True}, 6, 12),
        ({"fp8": "delayed"}, 1, 16),
        ({"fp8": "tensorwise", "tensor": 4, "sequence_parallel": True}, 1, 64),
        ({"fp8": "blockwise"}, 1, 128),
        ({"fp8": "blockwise", "tensor": 8, "sequence_parallel": True, "context": 2}, 4, 2048),
    ],
)
def test_alignment(layout, sequence, total):
    assert alignment(**layout) == Alignment(sequence, total)


def occupied(members, lengths, align):
    return sum(align.padded_sequence(lengths[index]) for index in members)


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), max_size=40),
    ranks=st.integers(1, 5),
    capacity=st.integers(128, 400),
    align=layouts,
    extra=st.none() | st.integers(0, 4),
)
def test_invariants(lengths, ranks, capacity, align, extra):
    fewest = len(plan_step(lengths, ranks, capacity, align, cost=FLOPS)[0])
    count = None if extra is None else fewest + extra
    plan = plan_step(lengths, ranks, capacity, align, count, FLOPS)
    bins = [members for rank in plan for members in rank]
    assert len(plan) == ranks
    assert {len(rank) for rank in plan} == {count or fewest}
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    for members in bins:
        assert members == sorted(members)
        padded = align.padded_total(occupied(members, lengths, align))
        assert padded <= capacity or len(members) == 1
    assert all(bins) or len(lengths) < len(bins)
    assert plan == plan_step(lengths, ranks, capacity, align, count, FLOPS)
    room = capacity // align.total * align.total
    total = sum(min(align.padded_sequence(length), room) for length in lengths)
    assert fewest >= max(1, -(-total // room // ranks))


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=2, max_size=40), ranks=st.integers(1, 3))
def test_too_few_micro_batches_are_refused_with_the_number_that_is_needed(lengths, ranks):
    fewest = len(plan_step(lengths, ranks, 100, Alignment())[0])
    impossible = (sum(lengths) - 1) // (100 * ranks)
    if impossible < 1:
        return
    with pytest.raises(UserError, match=f"it takes {fewest};"):
        plan_step(lengths, ranks, 100, Alignment(), impossible)


def test_a_pack_smaller_than_the_alignment_is_refused():
    with pytest.raises(UserError, match="128 or more"):
        plan_step([3], 1, 100, Alignment(1, 128))


def test_a_sequence_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        plan_step([3, 0], 1, 100, Alignment())


def tulu_like(count, seed=0):
    return np.clip(np.random.RandomState(seed).lognormal(6.0, 0.9, count), 16, 4096).astype(int).tolist()


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_costs_are_level(ranks):
    cost = sequence_flops(4096, 14336, 32)
    for seed in range(20):
        lengths = tulu_like(128, seed)
        plan = plan_step(lengths, ranks, 4096, Alignment(), None, cost)
        loads = [sum(cost(lengths[index]) for members in rank for index in members) for rank in plan]
        assert max(loads) <= 1.05 * np.mean(loads)
        whole = sum(lengths)
        assert len(plan[0]) <= -(-whole // 4096 // ranks) + 1


def test_a_tight_batch_is_level_too():
    """Longest first by cost does not fit here; the fullest bins do and are then levelled."""
    lengths = [6, 6, 5, 5, 4, 4] * 5
    plan = plan_step(lengths, 1, 10, Alignment(), 15, FLOPS)
    assert all(occupied(members, lengths, Alignment()) == 10 for members in plan[0])


def test_fast_enough_for_a_million_sequences():
    lengths = tulu_like(128 * 100)
    cost = sequence_flops(4096, 14336, 32)
    begin = time.process_time()
    for start in range(0, len(lengths), 128):
        plan_step(lengths[start : start + 128], 8, 4096, Alignment(), None, cost)
    assert (time.process_time() - begin) / 100 < 0.02


def test_flops_of_a_layer_counted_by_hand():
    """Width 2, feed-forward 3, one layer: 4 projections of 2x2 and 3 of 2x3 are 34 weights; attention reads 2 * 2 * s * s."""
    cost = sequence_flops(hidden=2, ffn=3, layers=1)
    assert cost(1) == 2 * 34 + 4
    assert cost(10) == 2 * 34 * 10 + 4 * 100
    assert sequence_flops(2, 3, 1, vocabulary=5)(1) - cost(1) == 20
