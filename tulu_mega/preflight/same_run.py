"""Whether a run directory can go on with these settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tulu_mega.config import RunSettings
from tulu_mega.config.effects import Effect, decides
from tulu_mega.config.stages import STAGES
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import resolve
from tulu_mega.launch.run_dir import CONFIG
from tulu_mega.outside.json_input import read_json_text
from tulu_mega.pins.record import Pins
from tulu_mega.preflight.earlier_defaults import as_before

_TRAIN, _SPLIT = "data.train", "data.split"


def same_run(settings: RunSettings, short_batches: bool = False) -> None:
    """Sees whether a run that is there already began with the settings of now, as far as they decide what is computed.

    Args:
        short_batches: the last batch of a run whose length is given in epochs may be short.

    Raises:
        UserError: it began with others; they are named.
    """
    file = Path(settings.run_dir) / CONFIG
    if not file.exists():
        return
    try:
        before = read_json_text(file.read_text())
        if not isinstance(before, dict):
            raise ValueError("no object")
    except (OSError, ValueError):
        raise UserError(f"{file}: cannot be read; choose another run_dir, or remove this one") from None
    there, here = before, json.loads(settings.model_dump_json())
    before, now = _flat(there), _flat(here)
    # compared as text: of data.train's amounts, 1 is a row and 1.0 all of them
    changed = [name for name in now | before if repr(before.get(name)) != repr(now.get(name))]
    changed = [name for name in changed if not as_before(name, before, settings)]
    # what only other stages have may have been decided by them: the run may be one of theirs
    classes = [type(settings), *(resolve(stage.settings) for stage in STAGES.values())]
    effects = {name: decides(classes, name) for name in changed}
    fixed = _length_fixed_by(settings, before, short_batches)
    matters = {Effect.DECIDES, Effect.LENGTH} if fixed else {Effect.DECIDES}
    pins = Pins.read(Path(settings.run_dir)) or Pins()
    changed = [
        name
        for name in changed
        if effects[name] in matters or (effects[name] is Effect.CONTENT and not _pinned(name, pins, there, here))
    ]
    if changed:
        raise UserError(
            f"run_dir = {settings.run_dir} holds a run with other settings: "
            + "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed)
            + (f" ({fixed})" if any(effects[name] is Effect.LENGTH for name in changed) else "")
            + ". Choose another run_dir, or the settings of before to go on"
        )


def _length_fixed_by(settings: RunSettings, before: Mapping[str, Any], short_batches: bool) -> str:
    """Why a run cannot be made longer or shorter: the steps done would have been others. Empty where they would not.

    Args:
        before: the run's settings by full name.
    """
    optim = settings.optim
    if optim.schedule != "constant" or optim.warmup:
        return (
            f"with optim.schedule = {optim.schedule!r} and optim.warmup = {optim.warmup:g} the length decides every step's rate; "
            f"to train on, begin a run with {settings.run_dir}/hf as model.path"
        )
    if short_batches and not (settings.train.steps and before.get("train.steps")):
        return "the last batch of train.epochs may be short; only train.steps can be changed for another number of steps"
    return ""


def _pinned(name: str, pins: Pins, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a setting names something in both, which is compared by content.

    Args:
        name: dotted, of a setting or of an entry in one that is a table.
    """
    setting = next((each for each in (*pins.pins, _SPLIT) if name == each or name.startswith(f"{each}.")), None)
    if setting == _SPLIT:
        return _TRAIN in pins.pins
    return setting is not None and bool(_at(before, setting) and _at(now, setting))


def _at(values: Mapping[str, Any], dotted: str) -> Any:
    """What is at a dotted place; None where nothing is."""
    for part in dotted.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
