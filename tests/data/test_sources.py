"""Rows come in order from any mix of files, and a bad one is named by file and line."""

import json
import os
import pickle

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tulu_mega.data.sources import load_rows
from tulu_mega.errors import UserError


def talk(text):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]}


def said(rows):
    return [rows.row(index)["messages"][0]["content"] for index in range(len(rows))]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_files_of_all_kinds_in_the_order_given(tmp_path):
    lines, array, table = tmp_path / "b.jsonl", tmp_path / "c.json", tmp_path / "a.parquet"
    # a line separator inside a text is no end of line, and keys may differ from row to row
    lines.write_text(json.dumps(talk("1\u2028")) + "\r\n\n  \n" + json.dumps({"n": 1, **talk("é")}, ensure_ascii=False), "utf-8")
    array.write_text(json.dumps([talk("3"), {"id": "x", **talk("4")}], indent=1))
    pq.write_table(pa.table({"messages": [talk("5")["messages"]]}), table)
    rows = load_rows([str(lines), str(array), str(table)])
    assert said(rows) == ["1\u2028", "é", "3", "4", "5"]
    assert [rows.where(index).removeprefix(f"{tmp_path}/") for index in range(5)] == [
        "b.jsonl line 1",
        "b.jsonl line 4",
        "c.json item 1",
        "c.json item 2",
        "a.parquet row 1",
    ]
    assert said(pickle.loads(pickle.dumps(rows))) == said(rows)  # noqa: S301 our own
    with pytest.raises(IndexError):
        rows.row(5)


def test_json_that_is_jsonl_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(talk("1")) + "\n" + json.dumps(talk("2")) + "\n", "utf-8")
    assert said(load_rows(str(tmp_path / "a.json"))) == ["1", "2"]


def test_a_directory_is_a_data_set(tmp_path):
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"messages": [talk("1")["messages"]]}), tmp_path / "set" / "train.parquet")
    assert said(load_rows(str(tmp_path / "set"))) == ["1"]
    with pytest.raises(UserError, match="split 'other'"):
        load_rows(str(tmp_path / "set"), "other")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"messages": [', "not valid JSON"),
        (b"[1]", "expected a JSON object on each line, got list"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_line_spoils_only_itself(tmp_path, line, text):
    good = json.dumps(talk("1")).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b"\n\n" + line + b"\n" + good + b"\n")
    rows = load_rows(str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=text):
        rows.row(1)
    assert rows.where(1).endswith("a.jsonl line 3")
    assert rows.row(2) == talk("1")


def test_everything_wrong_is_told_at_once(tmp_path):
    for name, content in {
        "empty.jsonl": "\n\n",
        "list.json": "[]",
        "broken.json": "[1,\n 2",
        "x.csv": "a",
        "bad.parquet": "no",
    }.items():
        (tmp_path / name).write_text(content)
    names = ["gone.jsonl", "empty.jsonl", "list.json", "broken.json", "x.csv", "bad.parquet"]
    with pytest.raises(UserError) as caught:
        load_rows([*(str(tmp_path / name) for name in names), "nobody/nothing"])
    expected = [
        "no such file",
        "no rows",
        "no rows",
        "line 2: not valid JSON",
        "'.csv'",
        "Parquet",
        "nobody/nothing",
    ]
    assert len(caught.value.problems) == len(expected)
    for problem, text in zip(caught.value.problems, expected, strict=True):
        assert text in problem
        assert "\n" not in problem
    with pytest.raises(UserError, match="no file"):
        load_rows([])


def test_the_fingerprint_follows_content_and_order(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(json.dumps(talk("1")))
    second.write_text(json.dumps(talk("2")))
    whole = load_rows([str(first), str(second)]).fingerprint
    assert load_rows([str(first), str(second)]).fingerprint == whole
    assert load_rows([str(second), str(first)]).fingerprint != whole
    second.write_text(json.dumps(talk("3")))
    assert load_rows([str(first), str(second)]).fingerprint != whole


def test_a_parquet_file_changed_within_the_same_second_is_read_anew(tmp_path):
    path = tmp_path / "a.parquet"
    for text in ("1", "2"):
        pq.write_table(pa.table({"messages": [talk(text)["messages"]]}), path)
        os.utime(path, (1, 1))
        assert said(load_rows(str(path))) == [text]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_name_that_a_row_has_twice_is_refused(tmp_path, name):
    """Only one of the two could be used, and nobody would be told which."""
    row = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    (tmp_path / name).write_text(f"[{row}]" if name.endswith("json") else row)
    with pytest.raises((ValueError, UserError), match="not valid JSON: it has 'content' twice"):
        load_rows(str(tmp_path / name)).row(0)
