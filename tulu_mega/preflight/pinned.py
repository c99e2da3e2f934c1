"""Whether a run finds what it depends on as it was when it began."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path

from tulu_mega.config import RunSettings
from tulu_mega.launch.run_dir import CONFIG, DATA, HELDOUT
from tulu_mega.outside.json_input import read_json_text
from tulu_mega.pins import code, directories, rows
from tulu_mega.pins.compare import Pinning
from tulu_mega.pins.directories import Directory
from tulu_mega.pins.record import Pin, Pins
from tulu_mega.preflight.findings import Findings


def begin(settings: RunSettings, findings: Findings) -> None:
    """Opens the run's pins; those of a start that never became a run do not count.

    Raises:
        UserError: they cannot be read.
    """
    run_dir = Path(settings.run_dir)
    began = (run_dir / CONFIG).exists()
    pins = Pins.read(run_dir) if began else None
    old = began and pins is None
    new = Pins(_of_stores(run_dir)) if old else Pins(day=date.today().isoformat())
    findings.pins = Pinning(run_dir, pins or new, settings.accept_changes, old)


def directory(findings: Findings, setting: str, at: Directory) -> None:
    """Pins a model's or tokenizer's directory, large files of other stamps aside: the ranks read them."""
    pinning = findings.pins
    before = pinning.pins.pins.get(setting)
    whole = partial(directories.pin, at, before, limit=None, every=findings.verify)
    pinning.settle(setting, whole() if findings.verify else directories.pin(at, before), whole)


def verifiers(findings: Findings, custom: dict[str, str], needed: list[str]) -> None:
    """Pins the code that judges.

    Args:
        custom: name = ``module:function``.
        needed: names of the verifiers that rows name.
    """
    if custom:
        now = code.custom(custom)
        code.adopt(findings.pins.pins.pins.get("rewards.custom"), now)
        findings.pins.settle("rewards.custom", now)
    own = {name.lower() for name in custom}
    if built_in := [name for name in needed if name not in own]:
        findings.pins.settle("rewards.verifiers", code.built_in(built_in), some=True)


def ends(findings: Findings, keep: bool) -> None:
    """Completes the pins.

    Args:
        keep: write them, and tell what there is to tell.
    """
    pinning = findings.pins
    pinning.ends()
    if keep:
        pinning.pins.write(pinning.run_dir)
        for note in pinning.notes:
            print(note, file=sys.stderr, flush=True)


def lines(findings: Findings) -> Iterator[str]:
    """What `check` says of pins."""
    pinning = findings.pins
    yield from pinning.notes
    for setting, pin in pinning.pins.pins.items():
        unread = sum(part.digest is None for part in pin.parts.values())
        waiting = f", {unread} to be read at the start" if unread else ""
        yield f"{setting} = {pin.given}: {'read' if findings.verify else 'pinned'}, {len(pin.parts)} parts{waiting}"
    for record in pinning.pins.accepted:
        yield f"accepted {record['when']}: {record['setting']}: {'; '.join(record['what'])}"


def _of_stores(run_dir: Path) -> dict[str, Pin]:
    """Pins of the rows that a run of before tokenised: its stores say what they were made of."""
    found = {}
    for setting, name in (("data.train", DATA), ("heldout.data", HELDOUT)):
        try:
            found[setting] = rows.pin(read_json_text((run_dir / name / "meta.json").read_text(encoding="utf-8"))["sources"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found
