"""Every layout sees the same rows, every row is seen once an epoch, and a step is a function of its number."""

import json

import pytest

from tulu_mega.config import DataSettings, TrainSettings
from tulu_mega.data.encoding import ConversationEncoding
from tulu_mega.data.loader import PackedLoader
from tulu_mega.data.prepare import build
from tulu_mega.data.sources import load_rows
from tulu_mega.errors import UserError
from tulu_mega.layout.alignment import alignment

ROWS = 23


@pytest.fixture
def store(tmp_path, tokenizer):
    lines = [{"input_ids": [n] * (2 + n % 7), "labels": [-100] * (n % 3) + [n] * (2 + n % 7 - n % 3)} for n in range(ROWS)]
    lines = [line for line in lines if len(line["labels"]) == len(line["input_ids"])]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return build(tmp_path / "store", load_rows(str(path)), ConversationEncoding(tokenizer, "tulu", 16), progress=False)


def loader(store, rank=0, ranks=1, align=None, seed=5, pack_length=16, shuffle=True, **train):
    settings = TrainSettings(**{"global_batch": 5, "epochs": 2.0, **train})
    data = DataSettings(train="x", max_length=16, pack_length=pack_length, shuffle=shuffle)
    return PackedLoader(store, settings, data, seed, align or alignment(), rank, ranks)


def drawn(packed):
    return [row for step in range(packed.steps) for row in packed.rows(step)]


def test_every_row_once_an_epoch_in_another_order_each_time(store):
    count = len(store)
    rows = drawn(loader(store))
    first, second = rows[:count], rows[count:]
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second
    assert first != list(range(count))
    assert drawn(loader(store)) == rows
    assert drawn(loader(store, seed=6)) != rows
    assert drawn(loader(store, shuffle=False)) == [*range(count), *range(count)]


def test_steps(store):
    count = len(store)
    assert loader(store).steps == -(-2 * count // 5)
    assert len(drawn(loader(store))) == 2 * count
    assert len(loader(store).rows(loader(store).steps - 1)) == (2 * count - 1) % 5 + 1
    assert len(drawn(loader(store, epochs=0.5))) == (count + 1) // 2
    assert loader(store, epochs=0.01).steps == 1
    endless = loader(store, steps=30, epochs=1.0)
    assert (endless.steps, len(drawn(endless))) == (30, 150)
    assert len(loader(store, steps=1, global_batch=3 * count).rows(0)) == 3 * count
    for step in (-1, 30):
        with pytest.raises(IndexError):
            endless.rows(step)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("layout", [{}, {"context": 2}, {"tensor": 2, "sequence_parallel": True}])
def test_all_ranks_together_hold_the_batch(store, ranks, layout):
    align = alignment(**layout)
    loaders = [loader(store, rank, ranks, align) for rank in range(ranks)]
    for step in range(loaders[0].steps):
        shares = [each.batches(step) for each in loaders]
        batches = [batch for share in shares for batch in share.micro_batches]
        rows = loader(store).rows(step)
        assert len({len(share.micro_batches) for share in shares}) == 1
        assert all(share.rows == rows for share in shares)
        assert sorted(row for batch in batches for row in batch.rows_S.tolist() if row >= 0) == sorted(rows)
        figures = {(share.tokens, share.supervised_tokens, share.packed_tokens, share.sequences) for share in shares}
        packed = sum(len(batch.tokens_T) for batch in batches)
        trained = sum(int(batch.loss_mask_T.sum()) for batch in batches)
        assert figures == {(sum(len(store[row].input_ids) for row in rows), trained, packed, len(rows))}
        assert shares[0].padding == 1 - shares[0].tokens / packed


def test_a_step_does_not_depend_on_what_came_before(store):
    through = list(loader(store))
    for step in (4, 1, 7, 2, 3):
        resumed = loader(store).batches(step)
        assert resumed.rows == through[step].rows
        for one, other in zip(resumed.micro_batches, through[step].micro_batches, strict=True):
            assert one.tokens_T.equal(other.tokens_T)
            assert one.labels_T.equal(other.labels_T)
            assert one.cu_seqlens_S1.equal(other.cu_seqlens_S1)


def test_a_step_that_does_not_fit_is_found_before_the_run(store):
    loader(store).check()
    tight = loader(store, micro_batches=1)
    with pytest.raises(UserError, match=r"train\.micro_batches = 1 cannot hold"):
        tight.check()
    with pytest.raises(UserError, match="cannot hold"):
        list(tight)
    assert all(len(step.micro_batches) == 5 for step in loader(store, micro_batches=5))


@pytest.mark.parametrize("start", [1, 4])
def test_the_order_of_the_data_outlives_a_restart_under_another_number_of_ranks(store, start):
    """A step's rows depend on its number alone: not on where the run was taken up, nor on the data-parallel size."""
    undisturbed = [loader(store).rows(step) for step in range(loader(store).steps)]
    for ranks in (2, 4):
        shares = [loader(store, rank, ranks) for rank in range(ranks)]
        for step in range(start, len(undisturbed)):
            held = [
                row for each in shares for pack in each.batches(step).micro_batches for row in pack.rows_S.tolist() if row >= 0
            ]
            assert sorted(held) == sorted(undisturbed[step])
            assert all(each.rows(step) == undisturbed[step] for each in shares)
