"""Tokenised rows on disk, mapped into memory."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from tulu_mega.config import DataSettings, ModelSettings
from tulu_mega.data.encoding import Encoding, supervised
from tulu_mega.data.sources import Rows, load_rows
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.errors import UserError
from tulu_mega.records import Sequence

VERSION = 1
"""Raised whenever the same rows would give other tokens or another layout of the files."""

_CHUNK = 256
_SHOWN = 5
_ROWS_FOR_A_POOL = 4096
"""Below, starting worker processes takes longer than the work."""


@dataclass
class _Encoded:
    """What becomes of a chunk of rows."""

    tokens: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    dropped: int = 0
    rejected: int = 0
    problems: list[str] = field(default_factory=list)


class TokenStore:
    """Sequences in a directory.

    ``tokens.npy`` and ``labels.npy`` are int32, all sequences behind one another; ``offsets.npy`` is int64, where each begins and
    the last ends; ``supervised.npy`` is int32, one for each sequence; ``meta.json`` comes last.

    A sequence's number here is its row from now on: rows whose trained tokens were all cut off are left out and counted in
    ``dropped``.
    """

    def __init__(
        self, directory: Path, meta: dict, tokens: np.ndarray, labels: np.ndarray, offsets: np.ndarray, supervised: np.ndarray
    ):
        self.directory = directory
        self.key: str = meta["key"]
        self.dropped: int = meta["dropped"]
        self.max_token: int = meta["max_token"]
        """largest token or label, to compare with the model's vocabulary"""
        self.lengths = np.diff(offsets)
        """int64, tokens of each sequence"""
        self.supervised = supervised
        """int32, tokens of each sequence that are predicted and trained"""
        self._tokens, self._labels, self._offsets = tokens, labels, offsets

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Sequence:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = slice(self._offsets[row], self._offsets[row + 1])
        return Sequence(int(row), self._tokens[part].tolist(), self._labels[part].tolist())

    @classmethod
    def open(cls, directory: str | Path) -> TokenStore:
        """
        Raises:
            UserError: no store there, one of another version, or an incomplete one.
        """
        path = Path(directory)
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            if meta["version"] != VERSION:
                raise ValueError(f"version {meta['version']}, expected {VERSION}")
            arrays = [np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("tokens", "labels")]
            arrays += [np.load(path / f"{name}.npy", allow_pickle=False) for name in ("offsets", "supervised")]
            tokens, labels, offsets, counts = arrays
            if not len(tokens) == len(labels) == offsets[-1] == meta["tokens"] or len(counts) != len(offsets) - 1:
                raise ValueError("files of different lengths")
            return cls(path, meta, *arrays)
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise UserError(f"{path}: no tokenised data here, {missing} is missing; tokenise again") from None
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{path}: not tokenised data of this version ({error}); delete it and tokenise again") from None

    @classmethod
    def build(
        cls,
        directory: str | Path,
        rows: Rows,
        encoding: Encoding,
        key: str = "",
        workers: int | None = None,
        progress: bool = True,
    ) -> TokenStore:
        """Tokenises the rows into a new directory, which appears (or replaces an older one) only when complete.

        Args:
            directory: where to write.
            rows: what to tokenise.
            encoding: how.
            key: kept in the store, to tell later whether it is up to date.
            workers: processes; the cores this process may use when None. Few rows are done in this process.
            progress: draw a bar on stderr.

        Raises:
            UserError: with the first malformed rows and their number, or when no row has anything to train.
        """
        target = Path(directory)
        with _new_directory(target) as path:
            meta = _write(path, rows, encoding, workers or _cores(), progress)
            (path / "meta.json").write_text(json.dumps({"version": VERSION, "key": key, **meta}, indent=1), encoding="utf-8")
        return cls.open(target)


def prepare(data: DataSettings, model: ModelSettings, directory: str | Path, progress: bool = True) -> TokenStore:
    """The tokenised rows of ``data.train``: what lies in the directory when it is up to date, else tokenised anew.

    Call it on one process, then :meth:`TokenStore.open` on the others.

    Raises:
        UserError: data or tokenizer are not to be used; everything that is found is told.
    """
    problems: list[str] = []
    rows = tokenizer = None
    try:
        rows = load_rows(data.train, data.split)
    except UserError as error:
        problems += error.problems
    try:
        tokenizer = load_tokenizer(model.path, data.tokenizer, data.template, model.trust_remote_code)
    except UserError as error:
        problems += error.problems
    if rows is None or tokenizer is None:
        raise UserError(problems)
    encoding = Encoding(tokenizer, data.template, data.max_length)
    key = content_key(rows, encoding)
    try:
        store = TokenStore.open(directory)
    except UserError:
        store = None
    if store is not None and store.key == key:
        return store
    return TokenStore.build(directory, rows, encoding, key, data.workers, progress)


def content_key(rows: Rows, encoding: Encoding) -> str:
    """Digest of all that decides the tokens: rows, tokenizer, template, length, and this code's version."""
    tokenizer = encoding.tokenizer
    own = [tokenizer.get_chat_template(), tokenizer.special_tokens_map] if encoding.template == "tokenizer" else None
    parts = [VERSION, rows.fingerprint, tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token, own, encoding.max_length]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _cores() -> int:
    """Cores this process may use, which in a container or job are fewer than the machine's (Linux tells)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write(path: Path, rows: Rows, encoding: Encoding, workers: int, progress: bool) -> dict[str, int]:
    lengths, counts, problems = [], [], []
    dropped = rejected = 0
    max_token = 0
    with (
        _growing(path / "tokens.npy") as tokens,
        _growing(path / "labels.npy") as labels,
        tqdm(
            total=len(rows),
            desc="tokenising",
            unit="row",
            file=sys.stderr,
            disable=not progress,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,  # a log file keeps every state of the bar
            leave=False,
        ) as bar,
    ):
        for done, chunk in _chunks(rows, encoding, workers):
            dropped += chunk.dropped
            rejected += chunk.rejected
            problems += chunk.problems[: _SHOWN - len(problems)]
            for ids, targets in zip(chunk.tokens, chunk.labels, strict=True):
                tokens.write(ids.tobytes())
                labels.write(targets.tobytes())
                lengths.append(len(ids))
                counts.append(supervised(targets))
                max_token = max(max_token, int(ids.max()), int(targets.max()))
            bar.update(done)
    if rejected:
        more = [f"... {rejected} of {len(rows)} rows cannot be used; correct or remove them"] if rejected > len(problems) else []
        raise UserError(problems + more)
    if not lengths:
        raise UserError(
            f"none of the {len(rows)} rows has a trained token among its first {encoding.max_length}; "
            "raise data.max_length or give other rows"
        )
    np.save(path / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))
    np.save(path / "supervised.npy", np.array(counts, np.int32))
    return {"sequences": len(lengths), "tokens": sum(lengths), "dropped": dropped, "max_token": max_token}


def _encode_rows(rows: Rows, encoding: Encoding, start: int, stop: int) -> _Encoded:
    result = _Encoded()
    for index in range(start, stop):
        try:
            ids, labels = encoding(rows.row(index))
        except ValueError as error:
            result.rejected += 1
            if len(result.problems) < _SHOWN:
                result.problems.append(f"{rows.where(index)}: {error}")
            continue
        except UserError as error:
            raise UserError([f"{rows.where(index)}: {problem}" for problem in error.problems]) from None
        if supervised(labels):
            result.tokens.append(ids)
            result.labels.append(labels)
        else:
            result.dropped += 1
    return result


def _chunks(rows: Rows, encoding: Encoding, workers: int) -> Iterator[tuple[int, _Encoded]]:
    """Chunks of rows in order, each with its number of rows."""
    ranges = [(start, min(start + _CHUNK, len(rows))) for start in range(0, len(rows), _CHUNK)]
    # a tokenizer class that came with the model cannot be unpickled in a fresh process
    portable = type(encoding.tokenizer).__module__.startswith("transformers.")
    if workers == 1 or len(rows) < _ROWS_FOR_A_POOL or not portable:
        for start, stop in ranges:
            yield stop - start, _encode_rows(rows, encoding, start, stop)
        return
    # spawn: this process may hold threads and process groups by now, which a fork would not survive
    pool = ProcessPoolExecutor(min(workers, len(ranges)), multiprocessing.get_context("spawn"), _set_worker, (rows, encoding))
    waiting: deque[tuple[int, Future[_Encoded]]] = deque()
    try:
        for start, stop in ranges:
            waiting.append((stop - start, pool.submit(_work, start, stop)))
            if len(waiting) > 4 * workers:
                size, future = waiting.popleft()
                yield size, future.result()
        while waiting:
            size, future = waiting.popleft()
            yield size, future.result()
    except BrokenProcessPool:
        raise UserError("a tokenising process died, perhaps for want of memory; lower data.workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Rows, Encoding] | None = None


def _set_worker(rows: Rows, encoding: Encoding) -> None:
    global _worker
    _worker = rows, encoding


def _work(start: int, stop: int) -> _Encoded:
    assert _worker is not None
    return _encode_rows(*_worker, start, stop)


@contextmanager
def _growing(path: Path) -> Iterator[BinaryIO]:
    """An int32 ``.npy`` file to append raw values to; the header, which has room for any length, is set right at the end."""

    def header(length: int) -> dict:
        return {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int32)), "fortran_order": False, "shape": (length,)}

    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header(0))
        begin = file.tell()
        yield file
        length = (file.tell() - begin) // 4
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header(length))
        if file.tell() != begin:
            raise RuntimeError(f"{path}: NumPy's header changed its size")


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling that takes the target's place when the block ends well, and vanishes when not."""
    if target.exists() and not (target / "meta.json").is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: something else than tokenised data is there; move it away or give another directory")
    missing = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            target.rename(temporary / "replaced")
        temporary.rename(target)
        shutil.rmtree(target / "replaced", ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # another process may have put something there meanwhile
            for parent in missing:
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None
        raise
