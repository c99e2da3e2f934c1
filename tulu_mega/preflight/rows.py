"""Tokenises the rows that a command trains on, and says what is wrong with them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from functools import partial
from pathlib import Path

from tulu_mega.data.prepare import prepare
from tulu_mega.data.store import TokenStore
from tulu_mega.errors import UserError
from tulu_mega.preflight.findings import Findings
from tulu_mega.preflight.model import within_vocabulary


def tokenise(findings: Findings, elsewhere: Path | None = None) -> list[str]:
    """Tokenises the rows of the findings; where anything is wrong nothing new stays where they belong.

    Args:
        elsewhere: a directory for what is only looked at; the rows' own when None.

    Returns:
        every problem: those of the findings, and those of the rows.
    """
    made: list[Path] = []
    with tempfile.TemporaryDirectory() as scratch:
        for rows in findings.rows:
            # data is not written for a run that cannot start; its own problems are told all the same
            aside, quiet = Path(scratch) if findings.problems else elsewhere, bool(findings.problems)
            target = aside / rows.directory.name if aside else rows.directory
            made += [] if target.exists() else [target]
            store = findings.collect(partial(prepare, rows.data, rows.model, target, progress=not quiet, setting=rows.setting))
            if store and findings.config:
                findings.collect(partial(fits_vocabulary, rows.setting, store, findings.config))
        if findings.problems:
            for each in made:
                _discard(each)
    return list(dict.fromkeys(findings.problems))


def fits_vocabulary(name: str, store: TokenStore, config: dict) -> None:
    """Sees whether the tokens are of the model's vocabulary.

    Raises:
        UserError: they are not; the store is removed then, also where it was there before.
    """
    try:
        within_vocabulary(name, store.max_token, config)
    except UserError:
        _discard(store.directory)
        raise


def _discard(directory: Path) -> None:
    """Tokenised data that no run wants."""
    if directory.is_symlink():  # into data.cache, where it may serve another model
        directory.unlink()
    else:
        shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):  # other things of a run are there
        directory.parent.rmdir()
