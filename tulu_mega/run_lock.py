"""One run at a time in a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from tulu_mega.errors import UserError

_LOCK = ".lock"


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keeps a second run out of a directory, which is made if it is not there. Rank 0 only.

    Raises:
        UserError: another process has it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise UserError(f"run_dir = {run_dir}: another run is writing there; wait for it or choose another run_dir") from None
    try:
        yield
    finally:
        os.close(handle)


def check_free(run_dir: Path) -> None:
    """Sees whether :func:`locked` would succeed now; writes nothing. Raises as it does."""
    if (run_dir / _LOCK).exists():
        with locked(run_dir):
            pass
