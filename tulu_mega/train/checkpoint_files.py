"""Digests of checkpoints' files: taken while the files are written, compared before they are read."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist
from blake3 import blake3
from torch.distributed.checkpoint.filesystem import FileSystem

from tulu_mega.distributed.collectives import gathered, together
from tulu_mega.errors import UserError
from tulu_mega.outside.json_input import read_json_text
from tulu_mega.pins.digest import digest

MANIFEST = "training.json"
DAMAGED = ".damaged"
"""End of the name of a damaged checkpoint's directory, which is no longer taken for a checkpoint."""


class HashingFiles(FileSystem):
    """torch's files, each with a digest of what was written to it, by the thread that writes."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        """by a file's name"""

    @contextlib.contextmanager
    def create_stream(self, path, mode) -> Iterator[_Hashing]:
        with super().create_stream(path, mode) as stream:
            hashing = _Hashing(stream)
            yield hashing
            self.digests[Path(path).name] = hashing.digest()


class _Hashing:
    """A file that is written from its beginning to its end."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._hash = stream, blake3()
        self.tell, self.flush, self.fileno, self.close = stream.tell, stream.flush, stream.fileno, stream.close

    def write(self, data) -> int:
        self._hash.update(data)
        return self._stream.write(data)

    def digest(self) -> str:
        return self._hash.hexdigest()


def digests(directory: Path, files: Mapping[str, Any], taken: Mapping[str, str]) -> dict[str, str]:
    """The digest of each file of a checkpoint: as taken when it was written, read again where none was (small ones).

    Args:
        files: names within the directory.
        taken: by name within the directory.
    """
    return {name: taken.get(name) or digest(directory / name) for name in files}


def damaged(checkpoints: Path) -> list[str]:
    """Read all files of a run's checkpoints and return what is wrong with their bytes."""
    found = []
    for path in sorted(checkpoints.glob("step_*")):
        if not path.name.removeprefix("step_").isdigit():  # set aside, or still being written
            continue
        try:
            recorded = _recorded(path)
        except (OSError, ValueError) as error:
            found.append(f"{path / MANIFEST}: cannot be read: {error}")
            continue
        found += _odd(path, recorded)
    return found


def verified_or_set_aside(path: Path, before: str | None, at: Callable[[str], None]) -> bool:
    """Return whether a checkpoint's files are as they were written. Every rank calls it, and reads the files that the rank of its
    number wrote, which it is about to load.

    A damaged checkpoint is renamed, with a warning, if the run has another checkpoint to go on from.

    Args:
        before: names the checkpoint that the run would go on from instead; None where there is none.
        at: told of progress.

    Raises:
        UserError: on every rank, when it is damaged and there is none before it.
    """
    at("verifying the checkpoint")
    size = dist.get_world_size()
    with together(f"{path} could not be read"):
        mine = {name: each for name, each in _recorded(path).items() if _writer(name) % size == dist.get_rank()}
        found = _odd(path, mine)
    problems = [each for part in gathered(found) for each in part]
    if not problems:
        return True
    aside = path.with_name(path.name + DAMAGED)
    if before is None:
        raise UserError(
            [*problems, f"{path} is damaged, and no checkpoint is before it; choose another run_dir, or put back the files"]
        )
    with together(f"{path} is damaged and could not be renamed"):
        if dist.get_rank() == 0:
            for each in problems:
                print(f"warning: {each}", file=sys.stderr, flush=True)
            print(f"warning: going on from {before}; the damaged one is now {aside}", file=sys.stderr, flush=True)
            shutil.rmtree(aside, ignore_errors=True)  # an earlier one of the same step
            path.rename(aside)
    return False


def _recorded(path: Path) -> dict[str, str]:
    """By file; empty for a checkpoint of before. Raises ValueError where the manifest is none."""
    told = read_json_text((path / MANIFEST).read_text())
    found = told.get("digests", {}) if isinstance(told, dict) else None
    if not isinstance(found, dict) or any(Path(name).is_absolute() or ".." in Path(name).parts for name in found):
        raise ValueError("it lists no digests of its files")
    return found


def _odd(path: Path, recorded: Mapping[str, str]) -> list[str]:
    found = []
    for name, wanted in recorded.items():
        try:
            if digest(path / name) != wanted:
                what = "holds other bytes than were written (a disk's or memory's error, or somebody wrote there)"
                found.append(f"{path / name}: {what}")
        except (OSError, ValueError) as error:  # a name that no file can have
            found.append(f"{path / name}: cannot be read: {error}")
    return found


def _writer(name: str) -> int:
    """The rank that wrote a file, as torch names files: ``__3_0.distcp``; 0 of others."""
    number = Path(name).name.removeprefix("__").partition("_")[0]
    return int(number) if number.isdigit() else 0
