"""Saving one engine, at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tulu_mega.train import checkpoint
from tulu_mega.train.engine import Engine
from tulu_mega.train.engine_state import Format
from tulu_mega.train.saver import Saver


def save(engine: Engine, directory: Path, step: int, state: dict[str, Any], keep: int, format: Format = "reshardable") -> Path:
    """Writes a checkpoint, then removes all but the newest `keep`. Called by every rank; arguments and errors of `Saver`."""
    Saver({"model": engine}, directory, keep, format, asynchronous=False).save(step, state)
    return directory / checkpoint.step_name(step)
