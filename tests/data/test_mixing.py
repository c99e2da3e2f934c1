"""Amounts of several sources, the cache that runs share, and the rows that are left out."""

import fcntl
import json
import re
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tulu_mega.config import (
    DataInspectSettings,
    DataMixSettings,
    DataSettings,
    DecontaminateSettings,
    ModelSettings,
    SftSettings,
    load,
)
from tulu_mega.config.texts import as_toml
from tulu_mega.data import prepare as prepare_module
from tulu_mega.data.mixing import draw
from tulu_mega.data.prepare import prepare
from tulu_mega.data.sources import load_rows
from tulu_mega.data.store import REJECTS, Reject, TokenStore
from tulu_mega.errors import UserError
from tulu_mega.preflight.rows import fits_vocabulary
from tulu_mega.preflight.same_run import same_run


def talk(user, assistant="ok"):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def said(rows):
    return [rows.row(index)["messages"][0]["content"] for index in range(len(rows))]


@pytest.fixture
def files(tmp_path):
    """a: 10 rows of JSONL with a blank line before each, b: 4 rows of Parquet."""
    a, b = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    a.write_text("".join(f"\n{json.dumps(talk(f'a{n}'))}\n" for n in range(10)))
    pq.write_table(pa.table({"messages": [talk(f"b{n}")["messages"] for n in range(4)]}), b)
    return str(a), str(b)


@pytest.fixture
def settings(tmp_path, tokenizer_dir):
    """Settings of a file of lines, and where its tokens go."""

    def of(lines, **options):
        path = tmp_path / "train.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return DataSettings(train=str(path), **{"workers": 1, **options}), ModelSettings(path=str(tokenizer_dir))

    return of


@hypothesis_settings(deadline=None)
@given(st.integers(1, 60), st.floats(0.02, 5.0), st.integers(0, 2**40))
def test_a_share_draws_all_rows_equally_often_but_for_one(rows, share, seed):
    if share * rows < 1:
        with pytest.raises(UserError, match="less than one"):
            draw(rows, share, seed, "x")
        return
    drawn = draw(rows, share, seed, "x")
    assert abs(len(drawn) - share * rows) < 1
    times = np.bincount(drawn, minlength=rows)
    assert times.max() - times.min() <= 1
    assert (drawn == draw(rows, share, seed, "y")).all()


def test_whole_shares_are_exact_and_counts_are_counts():
    assert draw(30, 0.1, 1, "x").size == 3
    assert draw(100, 0.29, 1, "x").size == 29
    assert draw(3, 3.0, 1, "x").tolist() == [0, 1, 2] * 3
    assert draw(3, 3, 1, "x").tolist() == [0, 1, 2]
    assert draw(1000, 1, 1, "x").size == 1
    assert draw(1000, 1.0, 1, "x").size == 1000
    assert draw(50, 20, 1, "x").tolist() != draw(50, 20, 2, "x").tolist()
    # written down: a draw of this kind must never change under anybody's feet
    assert draw(10, 4, 42, "x").tolist() == [0, 1, 5, 8]
    with pytest.raises(UserError, match=r"x: data.train asks for 5 rows, it has 4; write 1.25 with a point to repeat"):
        draw(4, 5, 1, "x")


def test_a_mixture_of_files(files):
    a, b = files
    rows = load_rows({a: 4, b: 2.5}, seed=42)
    assert said(rows)[:4] == ["a0", "a1", "a5", "a8"]
    assert said(rows)[4:12] == ["b0", "b1", "b2", "b3"] * 2 and len(rows) == 14
    assert rows.where(1) == f"{a} line 4" and rows.where(4) == rows.where(8) == f"{b} row 1"
    assert [(it["rows"], it["amount"], it["drawn"]) for it in rows.sources()] == [(10, 4, 4), (4, 2.5, 10)]
    assert said(load_rows({b: 2.5, a: 4}, seed=42))[10:] == ["a0", "a1", "a5", "a8"]  # whatever stands before it
    assert rows.fingerprint == load_rows({a: 4, b: 2.5}, seed=42).fingerprint
    assert len({load_rows({a: amount, b: 1.0}, seed=seed).fingerprint for amount, seed in [(4, 1), (4, 2), (5, 1)]}) == 3


def test_everything_wrong_with_a_mixture_is_told_at_once(files, tmp_path):
    a, b = files
    with pytest.raises(UserError) as caught:
        load_rows({a: 11, b: 0.1, str(tmp_path / "gone.jsonl"): 1.0}, split={a[:-1]: "test"})
    split, count, share, gone = caught.value.problems
    assert "data.split" in split and "did you mean" in split
    assert "asks for 11 rows, it has 10" in count
    assert "0.1 of 4 rows, which is less than one" in share
    assert "no such file" in gone


@pytest.mark.parametrize("amount", ["0", "-3", "0.0", "-0.5", "true", '"half"', "[1]", "nan", "inf"])
def test_amounts_that_make_no_sense(amount):
    with pytest.raises(UserError) as caught:
        load(SftSettings, None, ["--model", "m", "--run_dir", "r", "--data.train", f'{{"a.jsonl" = {amount}, b = 1}}'])
    (problem,) = caught.value.problems
    assert problem.startswith("data.train: 'a.jsonl' = ") and "number of rows (500) or a share" in problem
    assert "'b'" not in problem


def test_an_empty_table():
    with pytest.raises(UserError, match="an empty table"):
        load(SftSettings, None, ["--model", "m", "--run_dir", "r", "--data.train", "{}"])


def test_a_table_in_the_file_is_the_table_on_flags_and_prints_as_it_reads(tmp_path):
    file = tmp_path / "mix.toml"
    file.write_text(
        'model = "m"\nrun_dir = "r"\n[data]\nsplit = {"owner/b" = "test"}\n'
        '[data.train]\n"dir/a.jsonl" = 3.0\n"owner/b" = 500\nplain = 1.0\n'
    )
    settings = load(SftSettings, str(file))
    flags = ["--data.train", '{"dir/a.jsonl" = 3.0, "owner/b" = 500, plain = 1.0}', "--data.split", '{"owner/b" = "test"}']
    assert settings == load(SftSettings, None, ["--model", "m", "--run_dir", "r", *flags])
    assert {name: type(amount) for name, amount in settings.data.train.items()} == {
        "dir/a.jsonl": float,
        "owner/b": int,
        "plain": float,
    }
    printed = tomllib.loads(as_toml(settings.model_dump()))
    assert SftSettings.model_validate(printed) == settings
    assert type(printed["data"]["train"]["plain"]) is float


@pytest.mark.parametrize(
    ("before", "now", "optim", "why"),
    [
        ({"steps": 4}, {"steps": 8}, {"schedule": "constant", "warmup": 0.0}, None),
        ({"steps": 4, "epochs": 1.0}, {"steps": 8, "epochs": 2.0}, {"schedule": "constant", "warmup": 0.0}, None),
        ({"steps": 4}, {"steps": 8}, {"schedule": "constant", "warmup": 0.1}, "warmup = 0.1 the length decides"),
        ({"steps": 4}, {"steps": 8}, {"schedule": "linear", "warmup": 0.0}, "optim.schedule = 'linear'"),
        ({"epochs": 1.0}, {"epochs": 2.0}, {"schedule": "constant", "warmup": 0.0}, "train.epochs may be short"),
        ({"epochs": 1.0}, {"steps": 8}, {"schedule": "constant", "warmup": 0.0}, "train.epochs may be short"),
    ],
)
def test_a_run_is_made_longer_where_the_steps_done_stay_what_they_are(tmp_path, before, now, optim, why):
    def settings(train):
        data = DataSettings(train="a.jsonl")
        return SftSettings(model="m", run_dir=str(tmp_path), data=data, train=train, optim=optim)

    (tmp_path / "config.json").write_text(settings(before).model_dump_json())
    if why is None:
        same_run(settings(now), short_batches=True)
    else:
        with pytest.raises(UserError, match=re.escape(why)):
            same_run(settings(now), short_batches=True)


def test_a_run_goes_on_with_the_same_mixture_only(tmp_path):
    def same(train):
        same_run(SftSettings(model="m", run_dir=str(tmp_path), data=DataSettings(train=train, cache=str(len(train)))))

    settings = SftSettings(model="m", run_dir=str(tmp_path), data=DataSettings(train={"a.x": 1.0, "b": 2}))
    (tmp_path / "config.json").write_text(settings.model_dump_json())
    same({"a.x": 1.0, "b": 2})
    for train, changed in [({"a.x": 1, "b": 2}, "a.x was 1.0, is 1"), ({"a.x": 1.0}, "b was 2, is None"), ("a.x", "data.train")]:
        with pytest.raises(UserError, match=changed):
            same(train)


def test_a_store_of_a_mixture_knows_where_its_rows_are_from(files, tmp_path, tokenizer_dir):
    a, b = files
    data = DataSettings(train={a: 4, b: 1.5}, workers=1)
    store = prepare(data, ModelSettings(path=str(tokenizer_dir)), tmp_path / "store", progress=False)
    assert [store.where(row) for row in range(5)] == [f"{a} line {line}" for line in (2, 4, 12, 18)] + [f"{b} row 1"]
    assert store.sources == load_rows(data.train, seed=data.seed).sources()
    assert store[4].input_ids == store[4 + 0].input_ids and store.origins.shape == (10, 2)


def test_rows_that_are_not_used_are_listed(settings, tmp_path):
    lines = [talk("a", "b"), "{broken", talk("c" * 90, "d"), talk("e", "f" * 60), {"messages": []}]
    data, model = settings(lines, max_length=50, malformed="reject")
    store = prepare(data, model, tmp_path / "cut", progress=False)
    assert (len(store), store.dropped, store.rejected) == (2, 3, {"malformed": 2, "nothing_to_train": 1})
    assert store.cuts.tolist() == [0, 36]
    rejects = list(store.rejects())
    assert [(it.line, it.kind) for it in rejects] == [(2, "malformed"), (3, "nothing_to_train"), (5, "malformed")]
    assert rejects[0] == Reject(data.train, 2, "malformed", rejects[0].reason) and "not valid JSON" in rejects[0].reason
    assert "among the first 50 of its 116" in rejects[1].reason
    assert [json.loads(line)["source"] for line in (store.directory / REJECTS).read_text().splitlines()] == [data.train] * 3

    data, model = settings(lines, max_length=50, malformed="reject", overlong="reject")
    store = prepare(data, model, tmp_path / "cut", progress=False)
    assert (len(store), store.rejected) == (1, {"malformed": 2, "too_long": 2})
    assert [it.reason for it in store.rejects() if it.kind == "too_long"][1] == "86 tokens, data.max_length is 50"

    data, model = settings(lines[1:4], max_length=50, malformed="reject", overlong="reject")
    with pytest.raises(UserError, match=r"none of the 3 rows can be used \(1 malformed, 2 too long; at most 50 tokens each\)"):
        prepare(data, model, tmp_path / "none", progress=False)


def test_runs_share_what_is_in_the_cache(settings, tmp_path, monkeypatch):
    made = []
    build = prepare_module.build
    monkeypatch.setattr(prepare_module, "build", lambda *args: made.append(args[0]) or build(*args))
    cache = tmp_path / "cache"
    data, model = settings([talk("a"), talk("b")], cache=str(cache))
    first = prepare(data, model, tmp_path / "one" / "data", progress=False)
    second = prepare(data, model, tmp_path / "two" / "data", progress=False)
    assert len(made) == 1 and made[0].parent == cache
    assert first[1] == second[1] and TokenStore.open(tmp_path / "two" / "data")[0] == first[0]
    other, _ = settings([talk("a"), talk("b"), talk("c")], cache=str(cache))
    assert len(prepare(other, model, tmp_path / "two" / "data", progress=False)) == 3  # the link is set anew
    assert len(TokenStore.open(tmp_path / "one" / "data")) == 2
    # without the cache again, the run has its own, and the cache keeps what it had
    own = other.model_copy(update={"cache": None, "max_length": 40})
    prepare(own, model, tmp_path / "two" / "data", progress=False)
    assert not (tmp_path / "two" / "data").is_symlink() and len(made) == 3
    prepare(other, model, tmp_path / "two" / "data", progress=False)
    assert (tmp_path / "two" / "data").is_symlink() and len(made) == 3
    assert not [path for path in cache.iterdir() if path.name.endswith((".link", ".partial"))]
    (tmp_path / "three" / "data").mkdir(parents=True)
    (tmp_path / "three" / "data" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something other than tokenised data"):
        prepare(data, model, tmp_path / "three" / "data", progress=False)


def test_data_of_another_model_is_unlinked_and_stays_in_the_cache(settings, tmp_path):
    data, model = settings([talk("a")], cache=str(tmp_path / "cache"))
    store = prepare(data, model, tmp_path / "run" / "data", progress=False)
    with pytest.raises(UserError, match="another model"):
        fits_vocabulary("data.train", store, {"vocab_size": 1})
    assert not (tmp_path / "run").exists()
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_a_cache_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").write_text("")
    data, model = settings([talk("a")], cache=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"data.cache = .*cannot be written"):
        prepare(data, model, tmp_path / "run" / "data", progress=False)


def test_two_runs_at_once_tokenise_once(settings, tmp_path, monkeypatch, capsys):
    # a lock is held by an open file, not by a process: threads stand for runs
    data, model = settings([talk("a"), talk("b")], cache=str(tmp_path / "cache"))
    made, first_is_in, second_waits = [], Event(), Event()
    build = prepare_module.build
    flock = prepare_module.fcntl.flock

    def slow_build(*arguments):
        first_is_in.set()
        assert second_waits.wait(120)
        made.append(arguments[0])
        return build(*arguments)

    def telling_flock(handle, how):
        if not how & fcntl.LOCK_NB:
            second_waits.set()
        flock(handle, how)

    monkeypatch.setattr(prepare_module, "build", slow_build)
    monkeypatch.setattr(prepare_module.fcntl, "flock", telling_flock)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(prepare, data, model, tmp_path / "one", False)
        assert first_is_in.wait(120)
        two = pool.submit(prepare, data, model, tmp_path / "two", False)
        assert len(one.result(120)) == len(two.result(120)) == 2
    assert len(made) == 1
    assert (tmp_path / "one").resolve() == (tmp_path / "two").resolve()
    assert "another run is tokenising the same data" in capsys.readouterr().err


def test_the_examples_are_valid():
    examples = Path(__file__).parents[2] / "examples" / "data"
    for settings in (SftSettings, DataInspectSettings):
        data = load(settings, str(examples / "mix.toml")).data
        assert [type(amount) for amount in data.train.values()] == [float, float, int]
    assert load(DataMixSettings, str(examples / "mix.toml"), ["--output", "x"]).data == data
    asked = load(DecontaminateSettings, str(examples / "decontaminate.toml"))
    assert (asked.ngram, asked.threshold, asked.overlap, asked.roles) == (8, 0.5, 0.02, ["user"])
    assert asked.model_copy(update={"workers": None}) == DecontaminateSettings(
        train=asked.train, evaluations=asked.evaluations, output=asked.output
    )  # Tulu's figures are the defaults


def test_each_source_has_its_split(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            table = pa.table({"messages": [talk(f"{name} {split} {n}")["messages"] for n in range(2)]})
            pq.write_table(table, tmp_path / name / f"{split}.parquet")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert said(load_rows({one: 1, two: 1.0}, {two: "test"}, seed=3))[1:] == ["two test 0", "two test 1"]
    assert said(load_rows([one, two], "test")) == ["one test 0", "one test 1", "two test 0", "two test 1"]
    with pytest.raises(UserError, match="split 'eval'"):
        load_rows([one, two], {one: "eval"})
