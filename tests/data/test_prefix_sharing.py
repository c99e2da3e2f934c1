"""Groups of sequences: each comes back whole but for its last token, and nobody's labels change."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega.data.batch import pack_prefix_groups
from tulu_mega.data.packing import plan_step
from tulu_mega.data.prefix_sharing import PrefixGroup, plan_prefix_groups
from tulu_mega.layout.alignment import Alignment
from tulu_mega.layout.cost import sequence_flops
from tulu_mega.layout.schedule import Pipeline
from tulu_mega.records import IGNORE, TokenizedRow

FLOPS = sequence_flops(hidden=64, ffn=128, layers=2)


def test_the_example_of_the_record():
    group = PrefixGroup(
        (TokenizedRow(7, [10, 11, 20], [IGNORE, IGNORE, 20]), TokenizedRow(4, [10, 11, 30, 31], [IGNORE, IGNORE, 30, 31])), 1
    )
    batch = pack_prefix_groups([group], Alignment())
    assert group.size == len(batch.tokens_T) == 4
    assert batch.tokens_T.tolist() == [10, 11, 11, 30]
    assert batch.labels_T.tolist() == [IGNORE, 20, 30, 31]
    assert batch.positions_T.tolist() == [0, 1, 1, 2]
    assert batch.cu_seqlens_S1.tolist() == [0, 1, 2, 4]
    assert batch.rows_S.tolist() == [-1, 7, 4] and batch.num_sequences == 2
    assert batch.key_rows_K.tolist() == [0, 0, 1, 0, 2, 3]
    assert batch.cu_keys_S1.tolist() == [0, 1, 3, 6] and batch.cu_keys_S1.dtype == torch.int32
    assert (batch.lengths_S, batch.key_lengths_S) == ((1, 1, 2), (1, 2, 3))
    assert batch.trained_S.tolist() == [0, 1, 2] and not batch.ends_T.any()


def test_one_alone_shares_nothing():
    batch = pack_prefix_groups([PrefixGroup((TokenizedRow(0, [1, 2, 3], [IGNORE, 2, 3]),), 0)], Alignment())
    assert batch.tokens_T.tolist() == [1, 2] and batch.labels_T.tolist() == [2, 3] and batch.key_rows_K is None


groups = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.lists(st.integers(1, 30), min_size=1, max_size=6)),
    max_size=6,
)


def sequences_of(drawn) -> list[TokenizedRow]:
    """Prompts of few kinds of tokens, so that neighbours happen to begin alike too; responses that tell rows apart."""
    made = []
    for prompt, lengths in drawn:
        for length in lengths:
            response = [100 + len(made)] * length
            made.append(TokenizedRow(len(made), prompt + response, [IGNORE] * len(prompt) + response))
    return made


@settings(max_examples=200, deadline=None)
@given(groups, st.integers(1, 3), st.integers(32, 90), st.sampled_from([1, 4]), st.booleans())
def test_every_sequence_comes_back(drawn, ranks, capacity, total, share):
    sequences = sequences_of(drawn)
    plan = plan_prefix_groups(sequences, ranks, capacity, Alignment(1, total), FLOPS, Pipeline(), share)
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1
    found = {}
    for bin_ in (bin_ for rank in plan for bin_ in rank):
        batch = pack_prefix_groups(bin_, Alignment(1, total))
        size = sum(group.size for group in bin_)
        assert len(batch.tokens_T) == max(1, -(-size // total)) * total
        assert size <= capacity // total * total or [len(group.sequences) for group in bin_] == [1]
        assert share or batch.key_rows_K is None
        bounds = list(pairwise(batch.cu_seqlens_S1.tolist()))
        if batch.key_rows_K is None:
            seen = [torch.arange(a, b) for a, b in bounds]
        else:
            seen = batch.key_rows_K.split(batch.cu_keys_S1.diff().tolist())
        for row, (a, b), rows in zip(batch.rows_S.tolist(), bounds, seen, strict=True):
            assert rows[-(b - a) :].tolist() == list(range(a, b))  # its own tokens last: the last query is as far as the last key
            assert batch.positions_T[rows].tolist() == list(range(len(rows)))
            if row >= 0:
                labels = [IGNORE] * (len(rows) - (b - a)) + batch.labels_T[a:b].tolist()
                found[row] = batch.tokens_T[rows].tolist(), labels
            else:
                assert (batch.labels_T[a:b] == IGNORE).all()
    assert found == {one.row: (one.input_ids[:-1], one.labels[1:]) for one in sequences}


def test_what_is_shared_is_computed_once():
    sequences = sequences_of([([1] * 500, [20] * 8), ([2] * 500, [20] * 8)])
    plan = plan_prefix_groups(sequences, 1, 2000, Alignment(), FLOPS, Pipeline(), share=True)
    assert sum(group.size for bin_ in plan[0] for group in bin_) == 2 * (499 + 8 * 20)
    whole = FLOPS(519) * 8 - 7 * FLOPS(499)
    assert [group.cost(FLOPS) for bin_ in plan[0] for group in bin_] == [whole] * 2


def test_bin_are_cut_where_ranks_would_wait():
    """Three groups on two ranks: whole, one rank has two of them."""
    sequences = sequences_of([([group], [40] * 8) for group in range(3)])
    plan = plan_prefix_groups(sequences, 2, 4000, Alignment(), FLOPS, Pipeline(), share=True)
    costs = [sum(group.cost(FLOPS) for bin_ in rank for group in bin_) for rank in plan]
    assert max(costs) < 1.05 * min(costs)
    long = sequences_of([([group] * 3000, [40] * 8) for group in range(3)])
    plan = plan_prefix_groups(long, 2, 8000, Alignment(), FLOPS, Pipeline(), share=True)
    members = [[len(group.sequences) for bin_ in rank for group in bin_] for rank in plan]
    assert sorted(members) == [[8], [8, 8]], "two long prompts on the fuller rank, where halves would make it three"


def test_not_sharing_is_the_plan_of_sequences():
    sequences = sequences_of([([1, 2], [5, 9, 17, 3]), ([4], [30, 2, 2])])
    plan = plan_prefix_groups(sequences, 2, 40, Alignment(), FLOPS, Pipeline(), share=False)
    lengths = [len(one.input_ids) - 1 for one in sequences]
    rows = [[[group.sequences[0].row for group in bin_] for bin_ in rank] for rank in plan]
    assert rows == plan_step(lengths, 2, 40, Alignment(), cost=FLOPS)
