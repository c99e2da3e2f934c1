"""Published data that is not part of the project, read where it lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PLACE = "TULU_MEGA_REAL_DATA"
"""Environment variable: a directory of published data."""


def real_data(name: str) -> Path:
    """A file of the directory that `PLACE` names; skips the test without it."""
    if PLACE not in os.environ:
        pytest.skip(f"{PLACE} is not set: name the directory that holds {name}")
    path = Path(os.environ[PLACE], name)
    if not path.exists():
        pytest.skip(f"{path} is not there; {PLACE} names the directory that holds it")
    return path
