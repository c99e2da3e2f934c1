"""Rows from files and the hub. The only file that imports `datasets`."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tulu_mega.data import compressed
from tulu_mega.data.file_digests import directory_sha256, sha256
from tulu_mega.data.json_text import json_line, strict_line
from tulu_mega.data.mixing import Amount, draw
from tulu_mega.errors import UserError, nearest
from tulu_mega.outside.json_input import read_whole_json

SUFFIXES = (".jsonl", ".json", ".parquet")
_COMPRESSED = tuple(f"{kind}{packed}" for kind in (".jsonl", ".json") for packed in compressed.SUFFIXES)


class Part(Protocol):
    """Rows of one file or hub data set."""

    name: str
    """the file or data set, as messages call it"""
    unit: str
    """what a row is called: line, item or row"""
    fingerprint: str
    """changes with the content"""

    def __len__(self) -> int: ...

    def row(self, index: int) -> dict[str, Any]:
        """
        Raises:
            ValueError: the row cannot be read.
        """
        ...

    def raw(self, index: int, changed: Counter[str] | None = None) -> bytes:
        """The row as a line of JSON without its end; of a JSONL file, as it lies there.

        Args:
            changed: see :func:`tulu_mega.data.json_text.json_line`.
        """
        ...

    def number(self, index: int) -> int:
        """Line, item or row, counted from 1."""
        ...


class JsonLines:
    """A JSONL file, read line by line in place; a compressed one is first unpacked into a temporary file.

    No schema is inferred over the file, so rows may differ in their keys, and a broken line spoils nothing but itself.

    Raises:
        OSError: the file cannot be read.
        UserError: it cannot be unpacked.
    """

    unit = "line"

    def __init__(self, path: Path | str):
        self.name = str(path)
        self._unpacked = compressed.unpacked(Path(path))
        self._text = self._unpacked.name if self._unpacked else self.name
        digest, lines, starts, at = hashlib.sha256(), [], [], 0
        with open(self._text, "rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    lines.append(number)
                    starts.append(at)
                at += len(line)
        self.fingerprint = digest.hexdigest()
        self._lines, self._starts = np.array(lines, np.int64), np.array(starts, np.int64)

    def __len__(self) -> int:
        return len(self._lines)

    @cached_property
    def _file(self):
        return open(self._text, "rb")

    def __getstate__(self) -> dict[str, Any]:  # an open file does not cross to a worker process
        return {name: value for name, value in vars(self).items() if name not in ("_file", "_unpacked")}

    def raw(self, index: int, changed: Counter[str] | None = None) -> bytes:
        return strict_line(self._line(index), changed)

    def _line(self, index: int) -> bytes:
        self._file.seek(self._starts[index])
        return self._file.readline().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")

    def row(self, index: int) -> dict[str, Any]:
        try:
            row = read_whole_json(self._line(index))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start + 1} of the line") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error.msg} at character {error.colno}") from None
        except ValueError as error:
            raise ValueError(f"not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object on each line, got {type(row).__name__}")
        return row

    def number(self, index: int) -> int:
        return int(self._lines[index])


@dataclass(frozen=True)
class JsonArray:
    """A file that is one JSON list of objects."""

    name: str
    items: list[Any]
    fingerprint: str
    unit = "item"

    def __len__(self) -> int:
        return len(self.items)

    def row(self, index: int) -> dict[str, Any]:
        row = self.items[index]
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, got {type(row).__name__}")
        return row

    def raw(self, index: int, changed: Counter[str] | None = None) -> bytes:
        return json_line(self.items[index], changed)

    def number(self, index: int) -> int:
        return index + 1


@dataclass(frozen=True)
class Table:
    """A Parquet file or hub data set, as `datasets` maps it into memory."""

    name: str
    data: Any
    fingerprint: str
    unit = "row"

    def __len__(self) -> int:
        return len(self.data)

    def row(self, index: int) -> dict[str, Any]:
        return self.data[index]

    def raw(self, index: int, changed: Counter[str] | None = None) -> bytes:
        return json_line(self.data[index], changed)

    def number(self, index: int) -> int:
        return index + 1


class Drawn:
    """Some rows of a part, some of them perhaps repeatedly.

    Args:
        part: the whole source.
        indices: rows of it, counted from 0.
        amount: what was asked for.
    """

    def __init__(self, part: Part, indices: np.ndarray, amount: Amount):
        self.whole, self.amount = part, amount
        self.name, self.unit = part.name, part.unit
        self.fingerprint = f"{part.fingerprint}:{hashlib.sha256(indices.tobytes()).hexdigest()}"
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def row(self, index: int) -> dict[str, Any]:
        return self.whole.row(int(self._indices[index]))

    def raw(self, index: int, changed: Counter[str] | None = None) -> bytes:
        return self.whole.raw(int(self._indices[index]), changed)

    def number(self, index: int) -> int:
        return self.whole.number(int(self._indices[index]))


class Rows:
    """The parts behind one another."""

    def __init__(self, parts: list[Part]):
        self.parts = parts
        self._ends = [int(end) for end in np.cumsum([len(part) for part in parts])]

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        """Changes with the rows' content or order."""
        return hashlib.sha256("\n".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    def row(self, index: int) -> dict[str, Any]:
        """
        Raises:
            ValueError: the row is not a JSON object.
        """
        part, inner = self._find(index)
        return self.parts[part].row(inner)

    def raw(self, index: int, changed: Counter[str] | None = None) -> bytes:
        """The row as a line of JSON without its end; of a JSONL file, as it lies there. See :meth:`Part.raw`."""
        part, inner = self._find(index)
        return self.parts[part].raw(inner, changed)

    def origin(self, index: int) -> tuple[int, int]:
        """Part and line (item, row) in its file, counted from 0 and from 1."""
        part, inner = self._find(index)
        return part, self.parts[part].number(inner)

    def where(self, index: int) -> str:
        """For messages: ``train.jsonl line 17``, ``train.parquet row 17`` (counted from 1)."""
        part, number = self.origin(index)
        return f"{self.parts[part].name} {self.parts[part].unit} {number}"

    def sources(self) -> list[dict[str, Any]]:
        """What was drawn from where: name, unit, fingerprint, rows there, amount asked for (None: all), rows drawn."""
        return [
            {
                "source": part.name,
                "unit": part.unit,
                "fingerprint": whole.fingerprint,
                "rows": len(whole),
                "amount": getattr(part, "amount", None),
                "drawn": len(part),
            }
            for part in self.parts
            for whole in [part.whole if isinstance(part, Drawn) else part]
        ]

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)


def load_rows(
    train: str | list[str] | Mapping[str, Amount],
    split: str | Mapping[str, str] = "train",
    seed: int = 42,
    setting: str = "data.train",
    split_setting: str = "data.split",
) -> Rows:
    """Opens rows: of ``.jsonl``, ``.json`` and ``.parquet`` files (the former two also under gzip or zstd), or of data sets of
    the hub (``owner/name``, or ``owner/name:configuration``).

    Rows of JSONL are parsed when they are asked for; :meth:`Rows.row` raises for a broken line.

    Args:
        train: one source, several, or the amount of each (see :mod:`tulu_mega.data.mixing`).
        split: split of hub data sets; or that of some of them, ``train`` for the others.
        seed: decides which rows an amount draws.
        setting, split_setting: where the sources and their split are named, for messages.

    Raises:
        UserError: with every file or data set that is missing, unreadable or empty, an amount that cannot be drawn, or a split
            of a source that is not there.
    """
    names = [train] if isinstance(train, str) else list(train)
    if not names:
        raise UserError(f"{setting} names no file; give at least one")
    parts: list[Part] = []
    problems: list[str] = []
    splits = {} if isinstance(split, str) else split
    for name in splits.keys() - set(names):
        problems.append(f"{split_setting}: {name!r} is not in {setting}{nearest(name, names)}")
    for name in names:
        try:
            own_split = split if isinstance(split, str) else splits.get(name, "train")
            part = _open(name, own_split, setting, split_setting)
            if not len(part):
                raise UserError(f"{name}: no rows; expected at least one")
            if isinstance(train, Mapping):
                part = Drawn(part, draw(len(part), train[name], seed, name), train[name])
            parts.append(part)
        except UserError as error:
            problems += error.problems
        except OSError as error:
            problems.append(f"{name}: cannot be read: {error.strerror or error}")
    if problems:
        raise UserError(problems)
    return Rows(parts)


def _open(name: str, split: str, setting: str, split_setting: str) -> Part:
    path = Path(name).expanduser()
    if path.is_file():
        match "".join(path.suffixes[-2:] if path.suffix.lower() in compressed.SUFFIXES else path.suffixes[-1:]).lower():
            case ".jsonl" | ".jsonl.gz" | ".jsonl.zst":
                return JsonLines(path)
            case ".json" | ".json.gz" | ".json.zst":
                return _json(path)
            case ".parquet":
                return _table(name, "parquet", data_files=str(path), fingerprint=sha256(path))
            case suffix:
                known = ", ".join(SUFFIXES + _COMPRESSED)
                raise UserError(f"{name}: file type {suffix or 'without suffix'!r} is not known; expected {known}")
    if path.is_dir():
        fingerprint = directory_sha256(path, split)
        return _table(name, str(path), split=split, fingerprint=fingerprint, split_setting=split_setting)
    if path.suffix.lower() in SUFFIXES + compressed.SUFFIXES or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such file; correct {setting}")
    return _table(name, *name.split(":", 1), split=split, split_setting=split_setting)


def _json(path: Path) -> Part:
    """`.json` holds one list by custom, yet often it is JSONL by another name."""
    unpacked = compressed.unpacked(path)
    with unpacked or open(path, "rb") as file:
        file.seek(0)
        if file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
            return JsonLines(path)
        file.seek(0)
        text = file.read()
    try:
        items = read_whole_json(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg} at character {error.colno}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    return JsonArray(str(path), items, hashlib.sha256(text).hexdigest())


def _table(
    name: str,
    source: str,
    configuration: str | None = None,
    *,
    split: str = "train",
    data_files: str | None = None,
    fingerprint: str | None = None,
    split_setting: str = "data.split",
) -> Table:
    import datasets

    empty = _empty_parquet(data_files or source)
    if empty:  # which datasets has no words for
        raise UserError(f"{empty}: no rows; expected at least one")
    with _quiet(datasets):
        try:
            # a cache for each digest: the library's own knows files by their times alone
            cache = str(Path(datasets.config.HF_DATASETS_CACHE, fingerprint[:16])) if fingerprint else None
            data = datasets.load_dataset(source, configuration, data_files=data_files, split=split, cache_dir=cache)
        except Exception as error:  # builders raise their own, pyarrow's, the hub's and OSErrors
            root = error.__cause__ or error
            lines = str(root).strip().splitlines() or [type(root).__name__]
            what = "not a readable Parquet file" if data_files else f"split {split!r} of this data set cannot be loaded"
            known = f"; give a JSONL or Parquet file, a data set of the hub, and its split in {split_setting}"
            hint = "" if data_files else known
            raise UserError(f"{name}: {what}: {lines[0]}{hint}") from None
    return Table(name, data, fingerprint or f"{name}:{split}:{data._fingerprint}")


def _empty_parquet(source: str) -> Path | None:
    """The first Parquet file of a place that has no row."""
    import pyarrow.parquet

    path = Path(source)
    for file in sorted(path.rglob("*.parquet")) if path.is_dir() else [path] * path.is_file():
        with suppress(OSError, pyarrow.ArrowException):  # what cannot be read is told where it is read
            if not pyarrow.parquet.read_metadata(file).num_rows:
                return file
    return None


@contextmanager
def _quiet(datasets: Any):
    """No progress bars, and no log lines about what is raised as well."""
    shown, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
