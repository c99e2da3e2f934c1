"""Packing keeps sequences apart: nothing predicts its neighbour, nothing is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega.data.batch import pack
from tulu_mega.layout.alignment import Alignment, alignment
from tulu_mega.layout.context import context_rows, context_share
from tulu_mega.records import IGNORE, TokenizedRow


def test_the_example_of_the_record():
    batch = pack([TokenizedRow(7, [10, 11, 12], [IGNORE, IGNORE, 12]), TokenizedRow(4, [20, 21], [20, 21])], Alignment(1, 8))
    assert batch.tokens_T.tolist() == [10, 11, 12, 20, 21, 0, 0, 0]
    assert batch.labels_T.tolist() == [IGNORE, 12, IGNORE, 21, IGNORE, IGNORE, IGNORE, IGNORE]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.loss_mask_T.tolist() == [False, True, False, True, False, False, False, False]
    assert batch.cu_seqlens_S1.tolist() == [0, 3, 5, 8]
    assert batch.rows_S.tolist() == [7, 4, -1]
    assert (batch.lengths_S, batch.num_sequences) == ((3, 2, 3), 2)
    assert [t.dtype for t in (batch.tokens_T, batch.labels_T, batch.positions_T, batch.rows_S)] == [torch.int64] * 4
    assert (batch.cu_seqlens_S1.dtype, batch.loss_mask_T.dtype) == (torch.int32, torch.bool)


def test_no_sequence_is_one_segment_of_padding():
    batch = pack([], Alignment(2, 6), pad_token=9)
    assert batch.tokens_T.tolist() == [9] * 6
    assert batch.cu_seqlens_S1.tolist() == [0, 6]
    assert (batch.num_sequences, batch.lengths_S, int(batch.loss_mask_T.sum())) == (0, (6,), 0)


sequences = st.lists(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=9), max_size=5)


@settings(max_examples=200, deadline=None)
@given(rows=sequences, piece=st.sampled_from([1, 2, 4]), times=st.sampled_from([1, 3]))
def test_every_sequence_comes_back(rows, piece, times):
    given_rows = [TokenizedRow(n, [t for t, _ in row], [t if on else IGNORE for t, on in row]) for n, row in enumerate(rows)]
    batch = pack(given_rows, Alignment(piece, piece * times))
    bounds = batch.cu_seqlens_S1.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(batch.tokens_T) > 0 and bounds[-1] % (piece * times) == 0
    assert batch.num_sequences == len(rows)
    for row, begin, end in zip(batch.rows_S.tolist(), bounds, bounds[1:], strict=False):
        assert (end - begin) % piece == 0
        assert batch.positions_T[begin:end].tolist() == list(range(end - begin))
        ids = given_rows[row].input_ids if row >= 0 else []
        shifted = given_rows[row].labels[1:] if row >= 0 else []
        assert batch.tokens_T[begin : begin + len(ids)].tolist() == ids
        assert batch.labels_T[begin:end].tolist() == shifted + [IGNORE] * (end - begin - len(shifted))
    assert batch.loss_mask_T.equal(batch.labels_T != IGNORE)
    assert batch.labelled_N.tolist() == [at for at, label in enumerate(batch.labels_T.tolist()) if label != IGNORE]


@settings(max_examples=100, deadline=None)
@given(rows=sequences, size=st.sampled_from([2, 3]), tensor=st.sampled_from([1, 2]))
def test_context_shares_are_the_pack_in_other_words(rows, size, tensor):
    whole = laid(rows, tensor, size)
    shares = [context_share(whole, rank, size) for rank in range(size)]
    places = [context_rows(whole.lengths_S, rank, size) for rank in range(size)]
    assert torch.cat(places).sort().values.tolist() == list(range(len(whole.tokens_T)))  # each token once
    for rank, (share, rows_T) in enumerate(zip(shares, places, strict=True)):
        assert len(share.tokens_T) * size == len(whole.tokens_T) and len(share.tokens_T) % tensor == 0
        for name in ("tokens_T", "labels_T", "positions_T", "loss_mask_T"):
            assert getattr(share, name).equal(getattr(whole, name)[rows_T])
        assert share.labelled_N.tolist() == [at for at, label in enumerate(share.labels_T.tolist()) if label != IGNORE]
        assert share.cu_seqlens_S1 is whole.cu_seqlens_S1 and share.lengths_S is whole.lengths_S
        # as many pairs of query and key on every rank: what the zigzag is for
        assert int((share.positions_T + 1).sum()) == int((whole.positions_T + 1).sum()) // size
        assert share.num_sequences == (len(rows) if rank == 0 else 0)
    assert sum(int(share.loss_mask_T.sum()) for share in shares) == int(whole.loss_mask_T.sum())
    assert context_share(whole, 0, 1) is whole


def laid(rows, tensor=1, size=1):
    """A pack of the rows, aligned for a layout."""
    made = [TokenizedRow(n, [t for t, _ in row], [t if on else IGNORE for t, on in row]) for n, row in enumerate(rows)]
    return pack(made, alignment(tensor, tensor > 1, size))


names = st.text("abcde_", min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(rows=sequences, size=st.sampled_from([2, 3]), by_token=names, by_segment=names)
def test_columns_are_cut_by_their_suffix(rows, size, by_token, by_segment):
    by_token, by_segment = f"{by_token}_T", f"{by_segment}_S"
    whole = laid(rows, size=size)
    tokens, segments = torch.arange(len(whole.tokens_T)), torch.arange(len(whole.rows_S)).double()
    given = whole.with_columns(**{by_token: tokens}).with_columns(**{by_segment: segments})
    assert not whole.columns  # the batch that it was made of has none
    for rank in range(size):
        share = context_share(given, rank, size)
        assert share.column(by_token).equal(tokens[context_rows(whole.lengths_S, rank, size)])
        assert share.column(by_segment) is segments
        there = share.to(torch.device("meta"))
        assert {name: column.shape for name, column in there.columns.items()} == {
            by_token: share.tokens_T.shape,
            by_segment: whole.rows_S.shape,
        }
        assert {column.device.type for column in there.columns.values()} == {there.tokens_T.device.type} == {"meta"}


@settings(max_examples=100, deadline=None)
@given(name=st.text("abST_", max_size=6).filter(lambda name: not name.endswith(("_T", "_S"))))
def test_a_column_without_a_shape_is_refused(name):
    with pytest.raises(ValueError, match="expected a name that ends with its shape, _T"):
        laid([]).with_columns(**{name: torch.zeros(1)})


def test_a_column_that_cannot_be_is_refused():
    batch = laid([[(1, True), (2, True)]])
    with pytest.raises(ValueError, match="'labels_T': every batch has a field of that name"):
        batch.with_columns(labels_T=batch.labels_T)
    with pytest.raises(ValueError, match="'margin_S' has 2 values, but the batch 1 of that shape"):
        batch.with_columns(margin_S=torch.zeros(2))
    with pytest.raises(ValueError, match="'advantages_T' has 1 values, but the batch 2 of that shape"):
        batch.with_columns(advantages_T=torch.zeros(1))


def test_a_column_that_is_not_there():
    batch = laid([[(1, True), (2, True)]])
    assert batch.optional_column("margin_S") is None
    with pytest.raises(LookupError, match="the batch has no column 'margin_S'; it has none"):
        batch.column("margin_S")
    more = batch.with_columns(ref_logp_S=torch.zeros(1), advantages_T=torch.zeros(2))
    with pytest.raises(LookupError, match="no column 'margin_S'; it has 'advantages_T', 'ref_logp_S'"):
        more.column("margin_S")
    assert more.with_columns(ref_logp_S=torch.ones(1)).column("ref_logp_S").tolist() == [1.0]


def test_the_zigzag():
    assert context_rows((8, 4), 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_rows((8, 4), 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
    with pytest.raises(ValueError, match="6 tokens does not divide into 4 pieces"):
        context_rows((8, 6), 0, 2)
