"""Training rows from files and the hub. The only file that imports `datasets`."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tulu_mega.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")


class Part(Protocol):
    """Rows of one file or hub data set."""

    fingerprint: str
    """changes with the content"""

    def __len__(self) -> int: ...

    def row(self, index: int) -> dict[str, Any]:
        """
        Raises:
            ValueError: the row cannot be read.
        """
        ...

    def where(self, index: int) -> str:
        """A name for the row that lets a person find it."""
        ...


class JsonLines:
    """A JSONL file, read line by line where it lies.

    No schema is inferred over the file, so rows may differ in their keys, and a broken line spoils nothing but itself.
    """

    def __init__(self, path: Path):
        self.path = str(path)
        digest, lines, starts, at = hashlib.sha256(), [], [], 0
        with open(path, "rb") as file:
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
        return open(self.path, "rb")

    def __getstate__(self) -> dict[str, Any]:  # an open file does not cross to a worker process
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def row(self, index: int) -> dict[str, Any]:
        self._file.seek(self._starts[index])
        line = self._file.readline()
        try:
            row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start + 1} of the line") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error.msg} at character {error.colno}") from None
        except RecursionError:
            raise ValueError("not valid JSON: nested too deeply") from None
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object on each line, got {type(row).__name__}")
        return row

    def where(self, index: int) -> str:
        return f"{self.path} line {self._lines[index]}"


@dataclass(frozen=True)
class JsonArray:
    """A file that is one JSON list of objects."""

    path: str
    items: list[Any]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.items)

    def row(self, index: int) -> dict[str, Any]:
        row = self.items[index]
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, got {type(row).__name__}")
        return row

    def where(self, index: int) -> str:
        return f"{self.path} item {index + 1}"


@dataclass(frozen=True)
class Table:
    """A Parquet file or hub data set, as `datasets` maps it into memory."""

    name: str
    data: Any
    fingerprint: str

    def __len__(self) -> int:
        return len(self.data)

    def row(self, index: int) -> dict[str, Any]:
        return self.data[index]

    def where(self, index: int) -> str:
        return f"{self.name} row {index + 1}"


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
        return part.row(inner)

    def where(self, index: int) -> str:
        """For messages: ``train.jsonl line 17``, ``train.parquet row 17`` (counted from 1)."""
        part, inner = self._find(index)
        return part.where(inner)

    def _find(self, index: int) -> tuple[Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        return self.parts[part], index - (self._ends[part - 1] if part else 0)


def load_rows(train: str | list[str], split: str = "train") -> Rows:
    """Opens the rows that ``data.train`` names: ``.jsonl``, ``.json`` and ``.parquet`` files, or data sets of the hub.

    Rows of JSONL are parsed when they are asked for; :meth:`Rows.row` raises for a broken line.

    Raises:
        UserError: with every file or data set that is missing, unreadable or empty, or a table without the columns.
    """
    names = [train] if isinstance(train, str) else list(train)
    if not names:
        raise UserError("data.train names no file; give at least one")
    parts: list[Part] = []
    problems: list[str] = []
    for name in names:
        try:
            part = _open(name, split)
            if not len(part):
                raise UserError(f"{name}: no rows; expected at least one")
            parts.append(part)
        except UserError as error:
            problems += error.problems
        except OSError as error:
            problems.append(f"{name}: cannot be read: {error.strerror or error}")
    if problems:
        raise UserError(problems)
    return Rows(parts)


def _open(name: str, split: str) -> Part:
    path = Path(name).expanduser()
    if path.is_file():
        match path.suffix.lower():
            case ".jsonl":
                return JsonLines(path)
            case ".json":
                return _json(path)
            case ".parquet":
                return _table(name, "parquet", data_files=str(path), fingerprint=_sha256(path))
        raise UserError(f"{name}: file type {path.suffix or 'without suffix'!r} is not known; expected {', '.join(SUFFIXES)}")
    if path.is_dir():
        return _table(name, str(path), split=split)
    if path.suffix.lower() in SUFFIXES or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such file; correct data.train")
    return _table(name, name, split=split)


def _json(path: Path) -> Part:
    """`.json` holds one list by custom, yet often it is JSONL by another name."""
    with open(path, "rb") as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first != b"[":
        return JsonLines(path)
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg} at character {error.colno}") from None
    return JsonArray(str(path), items, _sha256(path))


def _table(name: str, source: str, split: str = "train", data_files: str | None = None, fingerprint: str | None = None) -> Table:
    import datasets

    with _quiet(datasets):
        try:
            # a file's digest is the configuration's name: the library's cache knows a file by its time alone
            data = datasets.load_dataset(source, fingerprint and fingerprint[:16], data_files=data_files, split=split)
        except Exception as error:  # builders raise their own, pyarrow's, the hub's and OSErrors
            root = error.__cause__ or error
            lines = str(root).strip().splitlines() or [type(root).__name__]
            what = "not a readable Parquet file" if data_files else f"split {split!r} of this data set cannot be loaded"
            hint = "" if data_files else "; give a JSONL or Parquet file, a data set of the hub, and its split in data.split"
            raise UserError(f"{name}: {what}: {lines[0]}{hint}") from None
    columns = set(data.column_names)
    if "messages" not in columns and not {"input_ids", "labels"} <= columns:
        raise UserError(f"{name}: has the columns {', '.join(sorted(columns))}; expected messages, or input_ids and labels")
    return Table(name, data, fingerprint or f"{name}:{split}:{data._fingerprint}")


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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
