"""A run directory: names of what lies in it, and the lock that lets one run at a time write there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tulu_mega.errors import UserError

CONFIG = "config.json"
"""The settings as resolved."""
CHECKPOINTS = "checkpoints"
"""The checkpoints."""
DATA = "data"
"""The tokenised training data."""
HELDOUT = "heldout"
"""The tokenised rows that are evaluated on."""
METRICS = "metrics.jsonl"
"""A line of figures for each step."""
_LOCK = ".lock"


def make_private(directory: Path) -> None:
    """Makes a directory that only its owner may enter, since prompts, responses and logs of a run lie in it; one that is there
    keeps its mode, so whoever wants others to read a run makes the directory first.

    Raises:
        OSError: it cannot be made.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # the mode is that of the last one


def lost(run_dir: str | None) -> str:
    """Describe what is lost when a run ends without saving."""
    if run_dir is None:
        return "nothing is kept"
    steps = [int(each.name[5:]) for each in Path(run_dir, CHECKPOINTS).glob("step_*") if each.name[5:].isdigit()]
    saved, done = max(steps, default=0), 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError), open(Path(run_dir, METRICS), "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16)))
        done = int(json.loads(file.read().splitlines()[-1])["step"])
    after = f", {done - saved} after it {'is' if done - saved == 1 else 'are'} lost" if done > saved else ""
    begin = f"the same command goes on from step {saved}" if saved else "nothing was saved, the same command begins anew"
    return f"{begin}{after}; SIGTERM would have saved first"


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keeps a second run out of a directory, which is made if it is not there. Rank 0 only.

    Raises:
        UserError: another process has it, or it cannot be written.
    """
    try:
        make_private(run_dir)
        handle = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"run_dir = {run_dir}: cannot be written: {error.strerror}; choose a directory you may write") from None
    try:
        if not taken(handle, run_dir):
            raise UserError(f"run_dir = {run_dir}: another run is writing there; wait for it or choose another run_dir")
        yield
    finally:
        os.close(handle)


def taken(handle: int, directory: Path) -> bool:
    """Takes the lock of an open file, until it is closed; False where another process has it.

    On a file system without locks (Lustre mounted without ``-o flock``) it warns and returns True.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(
            f"warning: {directory}: its file system has no locks ({error.strerror}); make sure that nothing else writes there",
            file=sys.stderr,
            flush=True,
        )
    return True


def check_free(run_dir: Path) -> None:
    """Check that :func:`locked` would succeed now, without writing. Raises as it does."""
    if (run_dir / _LOCK).exists():
        with locked(run_dir):
            pass
