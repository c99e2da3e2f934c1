"""A file's content as a digest, and what tells without reading it that a file is still the same."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

RACY = 2.0
"""Seconds: a file that changed so shortly before it was read may change again without another time (a disk's clock is coarse)."""


class Stamp(NamedTuple):
    """What the file system says of a file. Another stamp asks for a look at the content, and says nothing about it.

    `changed` is what no program can set back. The device is left out: it is another number after each mount.
    """

    size: int
    modified: int
    changed: int
    inode: int


def stamp(path: Path) -> Stamp:
    """The stamp of a file, or of what a link leads to. Raises OSError."""
    told = os.stat(path)
    return Stamp(told.st_size, told.st_mtime_ns, told.st_ctime_ns, told.st_ino)


def digest(path: Path) -> str:
    """Digest of a file's bytes, by all cores. Raises OSError."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def read(path: Path) -> tuple[str, Stamp | None]:
    """Digest and stamp of a file; no stamp where it is too fresh to be trusted, or changed meanwhile. Raises OSError."""
    began, before = time.time_ns(), stamp(path)
    content = digest(path)
    settled = max(before.modified, before.changed) <= began - RACY * 1e9 and stamp(path) == before
    return content, before if settled else None
