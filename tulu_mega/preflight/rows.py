"""Tokenises the rows that a command trains on, and says what is wrong with them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from functools import partial
from pathlib import Path

from tulu_mega.data.prepare import prepare
from tulu_mega.data.sources import Rows as Loaded
from tulu_mega.data.store import Reject, TokenStore
from tulu_mega.errors import UserError
from tulu_mega.pins import rows as pinned_rows
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
    day = findings.pins.pins.day if findings.pins else None
    with tempfile.TemporaryDirectory() as scratch:
        for rows in findings.rows:
            # data is not written for a run that cannot start; its own problems are told all the same
            aside, quiet = Path(scratch) if findings.problems else elsewhere, bool(findings.problems)
            target = aside / rows.directory.name if aside else rows.directory
            made += [] if target.exists() else [target]
            seen = partial(_pin, findings, rows.setting)
            how = partial(prepare, rows.data, rows.model, target, progress=not quiet, setting=rows.setting, seen=seen, day=day)
            store = findings.collect(how)
            if store:
                findings.notes += left_out(rows.setting, store)
            if store:
                findings.collect(partial(rows.look, store))
            if store and findings.config:
                findings.collect(partial(fits_vocabulary, rows.setting, store, findings.config))
            findings.notes += [f"{rows.setting}: {line}" for line in store.told] if store else []
        if findings.problems:
            for each in made:
                _discard(each)
    return list(dict.fromkeys(findings.problems))


def _pin(findings: Findings, setting: str, rows: Loaded) -> None:
    """Holds rows against those that the run began with, before a store takes the place of theirs."""
    if findings.pins:
        findings.pins.settle(setting, pinned_rows.pin(rows.sources()))


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


def left_out(setting: str, store: TokenStore) -> list[str]:
    """In words, the rows that are not used, with the first of each kind, and those that are cut off."""
    unit, used = ("rows", "pairs")[store.width - 1], len(store) // store.width
    said = []
    if store.dropped:
        first = {reject.kind: reject for reject in reversed(list(store.rejects()))}
        kinds = [f"{count:,} {_KINDS[kind]} (the first: {_shown(first[kind])})" for kind, count in store.rejected.items()]
        said.append(f"{setting}: {store.dropped:,} of {store.dropped + used:,} {unit} are left out: {'; '.join(kinds)}")
    if cut := int((store.cuts > 0).sum()):
        sequences = f"{cut:,} of {len(store):,} sequences"
        said.append(f"{setting}: {sequences} are cut off at data.max_length, by {int(store.cuts.sum()):,} tokens together")
    return said


_KINDS = {
    "malformed": "malformed",
    "too_long": "too long",
    "nothing_to_train": "with nothing to train",
    "nothing_to_learn": "with nothing to learn",
}


def _shown(reject: Reject) -> str:
    return f"{reject.source} {reject.line}: {reject.reason}"


def _discard(directory: Path) -> None:
    """Tokenised data that no run wants."""
    if directory.is_symlink():  # into data.cache, where it may serve another model
        directory.unlink()
    else:
        shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):  # other things of a run are there
        directory.parent.rmdir()


def damaged_stores(findings: Findings) -> list[str]:
    """What of the tokenised rows of a run is not what was written, all of them read."""
    found: list[str] = []
    for rows in findings.rows:
        with contextlib.suppress(UserError):  # none there yet, or none of this version: it is made at the start
            found += TokenStore.open(rows.directory).damaged()
    return [f"{file}: not what was written there; remove its directory, and the next start tokenises anew" for file in found]
