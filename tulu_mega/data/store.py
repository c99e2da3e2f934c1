"""Tokenised rows on disk, mapped into memory: the format of the files. `data.prepare` makes them of rows."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from tulu_mega.errors import UserError
from tulu_mega.launch.run_dir import make_private
from tulu_mega.outside.json_input import read_json_text
from tulu_mega.pins.digest import digest
from tulu_mega.records import TokenizedRow

VERSION = 5
"""Raised whenever the same rows would give other tokens or another layout of the files."""

REJECTS = "rejects.jsonl"
FILES = tuple(f"{name}.npy" for name in ("tokens", "labels", "offsets", "supervised", "cuts", "origins", "margins"))
"""The files that hold what is trained on."""


RejectKind = Literal["malformed", "too_long", "nothing_to_train", "nothing_to_learn"]


class Reject(NamedTuple):
    """A row that is not used."""

    source: str
    """file or data set"""
    line: int
    """line of a JSONL file, item or row of others, counted from 1"""
    kind: RejectKind
    reason: str


class TokenStore:
    """Sequences in a directory.

    ``tokens.npy`` and ``labels.npy`` are int32, all sequences behind one another; ``offsets.npy`` is int64, where each begins
    and the last ends; ``supervised.npy`` and ``cuts.npy`` are int32, ``origins.npy`` is int64 [sequences, 2], ``margins.npy``
    float64, one for each sequence; ``rejects.jsonl`` has the rows that are not used; ``meta.json`` comes last.

    A sequence's number here is its row from now on: rows that are not used have none. Of preference data, a pair's chosen
    sequence has an even number and the rejected one the next.
    """

    def __init__(
        self,
        directory: Path,
        meta: dict,
        tokens: np.ndarray,
        labels: np.ndarray,
        offsets: np.ndarray,
        supervised: np.ndarray,
        cuts: np.ndarray,
        origins: np.ndarray,
        margins: np.ndarray,
    ):
        self.directory = directory
        self.key: str = meta["key"]
        self.width: int = meta["width"]
        """sequences that belong together: 1, or 2 of preference data"""
        self.rejected: dict[str, int] = meta["rejected"]
        """rows that are not used, by the reason's kind; ``rejects.jsonl`` lists them"""
        self.template: Literal["tulu", "tokenizer"] = meta["template"]
        """template by which conversations are rendered"""
        self.told: list[str] = meta["told"]
        """what of the rows is not used, or changed, and where their turns end: a line each"""
        self.ends: list[int] = meta["ends"]
        """tokens of the tokenizer's own that end turns which are trained, the most frequent first"""
        self.sources: list[dict] = meta["sources"]
        """as :meth:`tulu_mega.data.sources.Rows.sources`"""
        self.digests: dict[str, str] = meta.get("digests", {})
        """by name, of the files; none of stores that were made before there were any"""
        self.max_token: int = meta["max_token"]
        """largest token or label, to compare with the model's vocabulary"""
        self.lengths = np.diff(offsets)
        """int64, tokens of each sequence"""
        self.supervised = supervised
        """int32, tokens of each sequence that are predicted and trained"""
        self.cuts = cuts
        """int32, tokens of each row that were cut off"""
        self.origins = origins
        """int64 [sequences, 2], each one's source, counted from 0, and line there, counted from 1"""
        self.margins = margins
        """float64, by how much each sequence is to be better than the next; 0 where nothing is said"""
        self._tokens, self._labels, self._offsets = tokens, labels, offsets

    @property
    def dropped(self) -> int:
        """Rows that are not used."""
        return sum(self.rejected.values())

    def where(self, row: int) -> str:
        """File and line of a sequence, as :meth:`tulu_mega.data.sources.Rows.where`."""
        source, number = self.origins[row].tolist()
        if not 0 <= source < len(self.sources):
            return f"{self.directory}: sequence {row}, whose source is not among those that its meta.json names"
        return f"{self.sources[source]['source']} {self.sources[source]['unit']} {number}"

    def rejects(self) -> Iterator[Reject]:
        """The rows that are not used, in order."""
        with open(self.directory / REJECTS, encoding="utf-8") as file:
            for line in file:
                yield Reject(**read_json_text(line))

    def damaged(self, limit: int | None = None) -> list[str]:
        """The files whose content is not what was written.

        Args:
            limit: bytes of the files together above which none is read; None reads all.
        """
        files = {self.directory / name: self.digests[name] for name in FILES if name in self.digests}
        if limit is not None and sum(file.stat().st_size for file in files) > limit:
            return []
        return [str(file) for file, content in files.items() if digest(file) != content]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> TokenizedRow:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = slice(self._offsets[row], self._offsets[row + 1])
        return TokenizedRow(int(row), self._tokens[part].tolist(), self._labels[part].tolist())

    @classmethod
    def open(cls, directory: str | Path) -> TokenStore:
        """
        Raises:
            UserError: no store there, one of another version, or an incomplete one.
        """
        path = Path(directory)
        try:
            meta = read_json_text((path / "meta.json").read_text(encoding="utf-8"))
            if meta["version"] != VERSION:
                raise ValueError(f"version {meta['version']}, expected {VERSION}")
            arrays = [np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("tokens", "labels")]
            per_sequence = ("supervised", "cuts", "origins", "margins")
            arrays += [np.load(path / f"{name}.npy", allow_pickle=False) for name in ("offsets", *per_sequence)]
            tokens, labels, offsets, *each = arrays
            whole = len(tokens) == len(labels) == offsets[-1] == meta["tokens"]
            if not whole or any(len(array) != len(offsets) - 1 for array in each):
                raise ValueError("files of different lengths")
            known = [type(each["source"]) is type(each["unit"]) is str for each in meta["sources"]]
            if not all(known) or not all(type(count) is int for count in meta["rejected"].values()):
                raise ValueError("sources or rejects of another form")
            if not isinstance(meta.get("digests", {}), dict):
                raise ValueError("digests of another form")
            origins = arrays[5]
            if offsets.ndim != 1 or origins.shape != (len(offsets) - 1, 2) or not np.all(origins[:, 0] < len(known)):
                raise ValueError("rows of no source")
            return cls(path, meta, *arrays)
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise UserError(f"{path}: no tokenised data here, {missing} is missing; tokenise again") from None
        except Exception as error:  # numpy reads its files' headers as Python
            raise UserError(f"{path}: not tokenised data of this version ({error}); delete it and tokenise again") from None


@contextmanager
def growing(path: Path) -> Iterator[BinaryIO]:
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
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling that takes the target's place when the block ends well, and vanishes when not."""
    refuse_strangers(target)
    missing = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        make_private(target.parent)  # a run's directory, mostly, which nobody has made before its data
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.is_symlink():  # to a cache that is no longer wanted
            target.unlink()
        elif target.exists():
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


def refuse_strangers(target: Path) -> None:
    """Raises UserError where something lies that is neither a store nor an empty directory."""
    if target.exists() and not (target / "meta.json").is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: something other than tokenised data is there; move it away or give another directory")
