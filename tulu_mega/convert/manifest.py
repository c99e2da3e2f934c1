"""What a conversion has written, by file and tensor, with hashes. One record a file while it goes on, one manifest at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from tulu_mega.bridge.files.disk import tensor_bytes
from tulu_mega.bridge.files.hf_writer import write_durably
from tulu_mega.errors import UserError
from tulu_mega.outside.json_input import read_json_text

NAME = "manifest.json"
_HASHES = {"blake3": blake3, "sha256": hashlib.sha256}
"""The first is written; it is some three times as fast. Manifests of before have the second."""


@dataclass(frozen=True)
class Entry:
    """A written tensor, or slab of one."""

    hash: str
    """hash of its values as they lie in memory, row by row, little-endian, behind the algorithm's name: ``blake3:af1349...``"""
    dtype: str
    shape: tuple[int, ...]
    place: tuple[int, int] | None = None
    """offset and length in the file where no header of the file says them"""


@dataclass(frozen=True)
class FileRecord:
    """A file that is completely on disk."""

    file: str
    size: int
    tensors: dict[str, Entry]


def entry(tensor: Tensor, place: tuple[int, int] | None = None) -> Entry:
    """Describes a tensor."""
    return Entry(hash_of(tensor), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), place)


def hash_of(tensor: Tensor, algorithm: str = "blake3") -> str:
    """Hash of the values, as in :class:`Entry`."""
    held = tensor.contiguous()
    return f"{algorithm}:{_HASHES[algorithm](tensor_bytes(held)).hexdigest()}"


def matches(tensor: Tensor, known: str) -> bool:
    """Whether the values are those that a hash was taken of."""
    return hash_of(tensor, known.partition(":")[0]) == known


def record_path(directory: Path, file: str) -> Path:
    """Where a file's record is while the conversion goes on."""
    return directory / f".{file}.json"


def write_record(directory: Path, record: FileRecord) -> None:
    """Notes a complete file. The record appears whole or not at all."""
    path = record_path(directory, record.file)
    partial = path.with_suffix(".part")
    write_durably(partial, json.dumps(asdict(record)).encode())
    partial.replace(path)


def read_record(directory: Path, file: str) -> FileRecord | None:
    """The record of a file that is there in the size it says; None otherwise."""
    try:
        record = _record(read_json_text(record_path(directory, file).read_text()))
        return record if (directory / file).stat().st_size == record.size else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_manifest(directory: Path, plan: dict[str, Any], records: Iterable[FileRecord]) -> None:
    """The whole conversion's, for `load`.

    Args:
        plan: what was converted, and how.
    """
    content = {"plan": plan, "files": [asdict(record) for record in records]}
    write_durably(directory / NAME, json.dumps(content, indent=1).encode() + b"\n")


def load(directory: Path) -> tuple[dict[str, Any], dict[str, FileRecord]] | None:
    """Plan and records by file of a directory that a conversion wrote; None when none did.

    Raises:
        UserError: when the manifest cannot be read.
    """
    path = directory / NAME
    if not path.is_file():
        return None
    try:
        content = read_json_text(path.read_text())
        records = [_record(each) for each in content["files"]]
        return content["plan"], {record.file: record for record in records}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error!r}); remove it to go without hashes, or convert again") from None


def hashes(directory: Path) -> dict[str, str]:
    """Tensor's name -> hash, of a directory that a conversion wrote; empty for others. Raises as `load`."""
    found = load(directory)
    return {name: held.hash for record in found[1].values() for name, held in record.tensors.items()} if found else {}


def _record(content: dict[str, Any]) -> FileRecord:
    tensors = {
        name: Entry(_known(held), held["dtype"], tuple(held["shape"]), tuple(held["place"]) if held["place"] else None)
        for name, held in content["tensors"].items()
    }
    return FileRecord(content["file"], content["size"], tensors)


def _known(held: dict[str, Any]) -> str:
    """An entry's hash, of this version or of the first, which wrote ``"sha256": "e3b0c4..."``."""
    found = held["hash"] if "hash" in held else f"sha256:{held['sha256']}"
    if found.partition(":")[0] not in _HASHES:
        raise ValueError(f"hash {found.partition(':')[0]!r} is not known, expected one of {', '.join(_HASHES)}")
    return found
