"""Published data that is not part of the project: read where it lies, beside the checkout."""

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "real"


def real_data(name: str) -> Path:
    """A file of the directory that TULU_MEGA_REAL_DATA names, or of ``shared/real`` beside the checkout; skips without it."""
    path = Path(os.environ.get("TULU_MEGA_REAL_DATA", _BESIDE)) / name
    if not path.exists():
        pytest.skip(f"{path} is not there; set TULU_MEGA_REAL_DATA to the directory that holds {name}")
    return path
