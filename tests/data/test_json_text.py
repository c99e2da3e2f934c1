"""Lines that are written are JSON for every reader, whatever the rows held; and tables keep names whole."""

import io
import json
import os
from collections import Counter
from datetime import date

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from rich.table import Table

from tulu_mega.data.json_text import json_line, readable_line, strict_line, told
from tulu_mega.data.sources import load_rows
from tulu_mega.data.tools.tables import print_table
from tulu_mega.errors import UserError


def strict(line: bytes) -> object:
    return json.loads(line.decode(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_what_json_cannot_hold():
    row = {
        "a": [1.5, float("nan"), {"b": float("-inf")}],
        "text": "NaN é",
        "bytes": b"word",
        "raw": b"\xff\x00",
        "day": date(2026, 1, 2),
    }
    changed: Counter[str] = Counter()
    assert strict(json_line(row, changed)) == {
        "a": [1.5, None, {"b": None}], "text": "NaN é", "bytes": "word", "raw": "/wA=", "day": "2026-01-02",
    }  # fmt: skip
    assert told(changed) == [
        "a: NaN or infinity, written as null (2 times)",
        "raw: bytes that are no text, written in base64 (1 times)",
    ]
    assert json_line({"lone": "\ud800"}) == b'{"lone": "\\ud800"}'


def test_a_line_of_jsonl_stays_as_it_lies_unless_others_could_not_read_it():
    for line in (b'{"a":  1.50}', b'{"a": "NaN, Infinity"}'):
        assert strict_line(line) is line
    assert strict_line(b'{"a": [NaN, -Infinity], "b": "NaN"}') == b'{"a": [null, null], "b": "NaN"}'


@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl"])
def test_rows_of_every_kind_of_file_are_written_as_json(tmp_path, kind):
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"messages": [[{"role": "user", "content": "a"}]], "score": [float("nan")]}), file)
    else:
        row = '{"messages": [{"role": "user", "content": "a"}], "score": NaN}'
        file.write_text(f"[{row}]" if kind == "json" else row + "\n")
    assert strict(load_rows(str(file)).raw(0)) == {"messages": [{"role": "user", "content": "a"}], "score": None}


def test_a_parquet_file_without_rows_is_said_to_have_none(tmp_path):
    (tmp_path / "set").mkdir()
    for file in (tmp_path / "a.parquet", tmp_path / "set" / "b.parquet"):
        pq.write_table(pa.table({"messages": pa.array([], pa.list_(pa.string()))}), file)
    for name in (tmp_path / "a.parquet", tmp_path / "set"):
        with pytest.raises(UserError, match=r"[ab]\.parquet: no rows; expected at least one$"):
            load_rows(str(name))


def test_a_table_is_as_wide_as_its_names():
    table, name, out = Table("rows", "file"), "a/very/long/name/of/" + "x" * 90 + ".jsonl", io.StringIO()
    table.add_row("1", name)
    print_table(table, Console(file=out, width=80))
    assert name in out.getvalue()


def test_what_is_no_json_is_no_text_either():
    with pytest.raises(ValueError, match="a object cannot be written as JSON"):
        json_line({"image": object()})


def test_a_directory_whose_rows_changed_under_the_old_times_is_read_anew(tmp_path):
    file = tmp_path / "set/train.parquet"
    file.parent.mkdir()
    seen = []
    for text in ("old", "new"):
        pq.write_table(pa.table({"messages": [[{"role": "user", "content": text}]]}), file)
        os.utime(file, (1e9, 1e9))
        seen.append(load_rows(str(file.parent)).row(0)["messages"][0]["content"])
    assert seen == ["old", "new"]


def test_a_line_for_readers_has_nothing_that_they_refuse(tmp_path):
    odd = {"a": "\ud800\x1b\u2028é😀", "b": float("nan"), "\udfff": 1, "c": [b"x"], "d": date(2020, 1, 2)}
    (tmp_path / "x.jsonl").write_text(f"{readable_line(odd)}\n", encoding="utf-8")
    assert strict((tmp_path / "x.jsonl").read_bytes())["d"] == "2020-01-02"
    read = pyarrow.json.read_json(tmp_path / "x.jsonl").drop(["d"]).to_pylist()
    assert read == [{"a": "\\ud800\x1b\u2028é😀", "b": None, "\\udfff": 1, "c": ["x"]}]
