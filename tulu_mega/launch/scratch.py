"""A launcher's scratch folder, and the removal of folders that killed launchers left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "tulu_mega_ranks_"
_LOCK = ".lock"
_FRESH = 60.0
"""Seconds in which a folder may not have its lock yet."""


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder that is removed with the context. A killed process cannot remove its own, so the next launcher does."""
    sweep()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as made:
        folder = Path(made)
        with open(folder / _LOCK, "w") as lock:  # ends with the process, however that ends
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder


def sweep() -> None:
    """Removes the folders of this user's launchers that are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = (folder / _LOCK).stat()
            if folder.is_symlink() or found.st_uid != os.getuid() or time.time() - found.st_mtime < _FRESH:
                continue
            with open(folder / _LOCK) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its launcher lives
                shutil.rmtree(folder, ignore_errors=True)
