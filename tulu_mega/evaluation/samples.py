"""The responses of an evaluation on disk: one JSON object a problem, written as they come, so that none is asked twice."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from tulu_mega.bridge.files.hub import config_directory
from tulu_mega.data.json_text import json_line
from tulu_mega.data.places import check_writable
from tulu_mega.errors import UserError
from tulu_mega.outside.json_input import read_json_text
from tulu_mega.pins.digest import stamp
from tulu_mega.pins.directories import revision

Record = dict[str, Any]
_SYNC_SECONDS = 1.0
"""An answer is the system's as soon as it is appended, and outlives this process; so long at most until it is on the disk."""
_WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "*.py")


def model_identity(model: str) -> str:
    """Changes when the files of a model directory do, by their names and stamps (which no program can set back); of a hub name
    when its newest revision does.

    Raises:
        UserError: the hub does not have it.
    """
    directory = Path(model)
    if not directory.is_dir():
        return f"{model}@{revision(config_directory(model))}"
    files = sorted(file for pattern in _WEIGHTS for file in directory.glob(pattern))
    return hashlib.sha256(json.dumps([(file.name, *stamp(file)) for file in files]).encode()).hexdigest()


def key(*parts: Any) -> str:
    """What decides a problem's responses, in short."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


class SampleFile:
    """``samples/TASK.jsonl``: objects with ``key``, the problem and its ``responses``; nothing is written until there are some.

    Raises:
        UserError: the directory cannot be written to.
    """

    def __init__(self, path: Path):
        self.path = path
        self._synced = 0.0
        with self._writing():
            check_writable(path.parent)
            self._answered = {record["key"]: record for record in self._read()}

    def __getitem__(self, name: str) -> Record:
        return self._answered[name]

    def __contains__(self, name: str) -> bool:
        return name in self._answered

    def append(self, records: Iterable[Record]) -> None:
        """Adds answered problems, which are kept from then on whatever becomes of this process.

        Raises:
            UserError: they cannot be written.
        """
        with self._writing():
            for record in records:
                self._answered[record["key"]] = record
                self._file.write(json_line(record) + b"\n")
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def replace(self, records: Iterable[Record]) -> None:
        """Writes the file anew: the given records and nothing else, whole or not at all."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(b"".join(json_line(record) + b"\n" for record in records))
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            told = f"{self.path}: cannot be written ({error.strerror}); choose another output, or make room there"
            raise UserError(told) from None

    @cached_property
    def _file(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._trim()
        return self.path.open("ab")

    def _read(self) -> list[Record]:
        """The whole lines; what an interruption tore, or is no record, is asked again."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_bytes().splitlines():
            try:
                record = read_json_text(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("key"), str) and isinstance(record.get("responses"), list):
                records.append(record)
        return records

    def _trim(self) -> None:
        """Ends a torn last line, so that the next one begins a line of its own."""
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
