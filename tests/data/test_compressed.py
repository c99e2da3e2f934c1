"""Rows of compressed files: the same as of plain ones, pins and keys included, and damaged files refused."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from tulu_mega.data.sources import JsonLines, load_rows
from tulu_mega.errors import UserError

LINES = b"".join(json.dumps({"messages": [{"role": "user", "content": f"é {number}"}]}).encode() + b"\n" for number in range(500))


def zstd(data):
    return pa.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd), (".GZ", gzip.compress)])
def test_compressed_rows_are_those_of_the_plain_file(tmp_path, suffix, pack):
    plain, packed, split = tmp_path / "a.jsonl", tmp_path / f"b.jsonl{suffix}", tmp_path / f"c.jsonl{suffix}"
    plain.write_bytes(LINES)
    packed.write_bytes(pack(LINES))
    split.write_bytes(pack(LINES[:999]) + pack(LINES[999:]))  # as `cat` and parallel packers leave it
    rows = [load_rows(str(path)) for path in (plain, packed, split)]
    assert len({one.fingerprint for one in rows}) == 1, "pinned by the rows, not by how they are packed"
    assert [one.row(499) for one in rows] == [rows[0].row(499)] * 3 and rows[1].raw(3) == rows[0].raw(3)
    assert rows[1].where(7) == f"{packed} line 8"
    array = tmp_path / f"d.json{suffix}"
    array.write_bytes(pack(b'[{"messages": []}, {"messages": []}]'))
    assert len(load_rows(str(array))) == 2
    lines = tmp_path / f"e.json{suffix}"
    lines.write_bytes(pack(LINES))
    assert len(load_rows(str(lines))) == 500


def test_the_text_crosses_to_workers_and_goes_with_the_rows(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES))
    lines = JsonLines(path)
    lines.row(0)
    worker = pickle.loads(pickle.dumps(lines))  # noqa: S301 (our own)
    assert worker.row(499) == lines.row(499)
    text = Path(worker._text)
    assert text.exists()
    del worker
    assert text.exists(), "a worker's end leaves it to the others"
    del lines
    assert not text.exists()


def test_damaged_files_are_refused(tmp_path):
    damaged = {
        "cut.jsonl.gz": gzip.compress(LINES)[:-20],
        "cut.jsonl.zst": zstd(LINES)[:-20],
        "wrong.jsonl.gz": zstd(LINES),
        "wrong.jsonl.zst": LINES,
        "flipped.jsonl.gz": bytes(255 - byte if at == 300 else byte for at, byte in enumerate(gzip.compress(LINES))),
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.jsonl.bz2").write_bytes(b"")
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    names = [*damaged, "a.jsonl.bz2", "a.parquet.gz", "gone.jsonl.gz"]
    with pytest.raises(UserError) as caught:
        load_rows([str(tmp_path / name) for name in names])
    assert len(caught.value.problems) == len(names)
    for name, problem in zip(names, caught.value.problems, strict=True):
        assert problem.startswith(str(tmp_path / name))
        assert ("cannot be unpacked as" in problem) == (name in damaged)
    assert "expected .jsonl, .json, .parquet, .jsonl.gz" in caught.value.problems[-3]
    assert "no such file" in caught.value.problems[-1]
