"""Tokenised rows on disk: the same as tokenised in memory, complete or not there at all."""

import json

import numpy as np
import pytest

import tulu_mega.data.prepare as prepare_module
import tulu_mega.data.store as store_module
from tulu_mega.config import DataSettings, ModelSettings, PreferenceDataSettings
from tulu_mega.data.chat import encode
from tulu_mega.data.encoding import ConversationEncoding
from tulu_mega.data.prepare import build, prepare
from tulu_mega.data.sources import load_rows
from tulu_mega.data.store import TokenStore
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.errors import UserError
from tulu_mega.records import IGNORE


def talk(*texts):
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


@pytest.fixture
def ready(tmp_path, tokenizer_dir):
    """Writes lines to a file and prepares them."""

    def prepare_lines(lines, **options):
        path = tmp_path / "train.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        data = DataSettings(train=str(path), **{"workers": 1, **options})
        return prepare(data, ModelSettings(path=str(tokenizer_dir)), tmp_path / "store", progress=False)

    return prepare_lines


def test_what_is_stored_is_what_encode_gives(ready, tokenizer):
    talks = [talk("hi", "a"), talk("b", "hi 😀", "c", "d"), talk("é", "")]
    store = ready(talks)
    assert len(store) == 3
    for number, row in enumerate(talks):
        ids, labels = encode(row["messages"], tokenizer, "tulu", None)
        assert (store[number].row, store[number].input_ids, store[number].labels) == (number, ids, labels)
        assert store.lengths[number] == len(ids)
        assert store.supervised[number] == sum(label != IGNORE for label in labels)
    assert store.max_token == max(max(store[number].input_ids) for number in range(3))
    assert TokenStore.open(store.directory)[1] == store[1]
    with pytest.raises(IndexError):
        store[3]


def test_tokenised_rows_are_taken_as_they_are(ready):
    store = ready(
        [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}, {"input_ids": [1, 2], "labels": [1, 2]}], max_length=3
    )
    assert (store[0].input_ids, store[0].labels) == ([5, 6, 7], [-100, 6, -100])
    assert (store[1].input_ids, store[1].labels) == ([1, 2], [1, 2])
    assert store.supervised.tolist() == [1, 1]  # nothing comes before the first token to predict it
    assert store.max_token == 7


PAIR = {
    "chosen_input_ids": [1, 2, 3], "chosen_labels": [-100, 2, 3], "rejected_input_ids": [1, 4], "rejected_labels": [-100, 4],
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "row", "sequences"),
    [(DataSettings, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, 1), (PreferenceDataSettings, PAIR, 2)],
)
def test_tokenised_rows_need_no_tokenizer(tmp_path, settings, row, sequences):
    model = ModelSettings(path=str(tmp_path))

    def prepared(*lines, **options):
        path = tmp_path / "train.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return prepare(settings(train=str(path), **options), model, tmp_path / "store", progress=False)

    store = prepared(row, row)
    assert len(store) == 2 * sequences and store[0].input_ids == [1, 2, 3]
    assert prepared(row, row).key == store.key != prepared(row).key
    with pytest.raises(UserError, match=r"no tokenizer\.json there"):
        prepared(row, {**row, **talk("hi", "a"), next(iter(row)): None})  # one row that has none is enough
    with pytest.raises(UserError, match=r"line 2: .*not valid JSON"):
        prepared(row, "{broken")
    with pytest.raises(UserError, match="no such directory"):  # one that is named is to be there
        prepared(row, tokenizer=str(tmp_path / "absent"))


def test_rows_with_nothing_left_to_train_are_dropped_and_counted(ready):
    store = ready([talk("x" * 100, "a"), talk("a", "b")], max_length=50)
    assert (len(store), store.dropped) == (1, 1)
    with pytest.raises(UserError, match="none of the 2 rows"):
        ready([talk("x" * 100, "a"), talk("y" * 100, "b")], max_length=50)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{broken", "not valid JSON"),
        ({"text": "a"}, "has text; expected messages, or input_ids and labels"),
        ({"messages": "hi"}, "expected a list"),
        (talk("hi"), "nothing to train"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids but 1 labels"),
        ({"input_ids": [1, 2.0], "labels": [1, 2]}, "input_ids[1] is 2.0"),
        ({"input_ids": [1, True], "labels": [1, 2]}, "input_ids[1] is True"),
        ({"input_ids": [-1], "labels": [1]}, "input_ids[0] is -1"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "labels[1] is -1"),
        ({"input_ids": [2**31], "labels": [1]}, "input_ids[0] is 2147483648"),
        ({"input_ids": [], "labels": []}, "at least one token"),
        ({"input_ids": 3, "labels": 3}, "expected a list"),
    ],
)
def test_an_invalid_row_is_named_and_nothing_is_written(ready, tmp_path, line, text):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        ready([talk("a", "b"), "", line])
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path}/train.jsonl line 3: ")
    assert text in problem
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "train.jsonl"])


def test_many_invalid_rows_are_counted(ready):
    with pytest.raises(UserError) as caught:
        ready([{"n": 1}] * 20 + [talk("a", "b")])
    assert len(caught.value.problems) == 6
    assert "20 of 21 rows" in caught.value.problems[-1]


def test_data_and_tokenizer_problems_are_told_together(tmp_path):
    data = DataSettings(train=str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError) as caught:
        prepare(data, ModelSettings(path=str(tmp_path / "none")), tmp_path / "store")
    assert len(caught.value.problems) == 2


def test_reused_while_nothing_changed(ready, monkeypatch):
    talks = [talk("a", "b"), talk("c", "d e f")]
    made = []
    monkeypatch.setattr(prepare_module, "build", lambda *args: made.append(1) or build(*args))
    first = ready(talks)
    assert ready(talks)[1] == first[1]
    assert len(made) == 1
    ready(talks, workers=2)  # no matter
    assert len(made) == 1
    ready(talks, max_length=30)
    ready([*talks, talk("g", "h")], max_length=30)
    assert len(made) == 3
    assert len(TokenStore.open(first.directory)) == 3
    for module in (store_module, prepare_module):
        monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    ready([*talks, talk("g", "h")], max_length=30)
    assert len(made) == 4


def test_an_incomplete_store_is_refused_and_made_again(ready):
    store = ready([talk("a", "b")])
    whole = store[0]
    np.save(store.directory / "labels.npy", np.zeros(3, np.int32))
    with pytest.raises(UserError, match="different lengths"):
        TokenStore.open(store.directory)
    assert ready([talk("a", "b")])[0] == whole
    (store.directory / "meta.json").unlink()
    with pytest.raises(UserError, match=r"meta\.json is missing"):
        TokenStore.open(store.directory)
    with pytest.raises(UserError, match="something other"):  # might be anybody's files by now
        ready([talk("a", "b")])


@pytest.mark.slow
def test_worker_processes_give_the_same_in_the_same_order(ready, tmp_path, monkeypatch):
    talks = [talk(str(number), "x" * (number % 7)) for number in range(600)]
    alone = ready(talks)
    monkeypatch.setattr(prepare_module, "_ROWS_FOR_A_POOL", 1)
    encoding = ConversationEncoding(load_tokenizer(str(tmp_path / "tokenizer")), "tulu", 4096)
    rows = load_rows(str(tmp_path / "train.jsonl"))
    pooled = build(tmp_path / "pooled", rows, encoding, workers=2, progress=False)
    assert len(pooled) == 600
    assert all(pooled[number] == alone[number] for number in range(600))
    for name in ("tokens", "labels", "offsets", "supervised"):
        assert (pooled.directory / f"{name}.npy").read_bytes() == (alone.directory / f"{name}.npy").read_bytes()


@pytest.mark.parametrize("file", ["tokens.npy", "labels.npy", "origins.npy"])
def test_a_store_whose_bytes_are_others_is_made_again(ready, file, capsys, monkeypatch):
    rows = [talk("hi", "a"), talk("b", "c")]
    store = ready(rows)
    before = [store[number] for number in range(2)]
    damaged = bytearray((store.directory / file).read_bytes())
    damaged[-4] ^= 1
    (store.directory / file).write_bytes(damaged)
    assert TokenStore.open(store.directory).damaged() == [str(store.directory / file)]
    monkeypatch.setattr(prepare_module, "_VERIFIED", 0)
    assert ready(rows).damaged() and not capsys.readouterr().err, "of large ones only when that is asked for"
    monkeypatch.setattr(prepare_module, "_VERIFIED", 1 << 30)
    again = ready(rows)
    assert f"{store.directory / file}: not what was written there; tokenised anew" in capsys.readouterr().err
    assert [again[number] for number in range(2)] == before and not again.damaged()
    meta = json.loads((store.directory / "meta.json").read_text())
    del meta["digests"]  # as stores were before
    (store.directory / "meta.json").write_text(json.dumps(meta))
    assert ready(rows).damaged() == []
