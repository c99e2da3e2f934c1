"""A check, before any work, that results can be written."""

from __future__ import annotations

import os
from pathlib import Path


def check_writable(directory: Path) -> None:
    """Check that a directory can be written to, or made, without making it.

    Raises:
        OSError: it cannot.
    """
    path = directory.expanduser().absolute()
    found = next(each for each in (path, *path.parents) if each.exists())
    if not found.is_dir():
        raise NotADirectoryError(0, f"{found} is no directory")
    if not os.access(found, os.W_OK | os.X_OK):
        raise PermissionError(0, f"no permission to write to {found}")
