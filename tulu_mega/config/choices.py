"""Choices whose code lies on a floor above the settings: each is a file of a folder. No list names them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any


def choices(package: str, attribute: str) -> dict[str, Any]:
    """Return what the files of a folder define under one name, by the file's name, in alphabetical order.

    Args:
        package: dotted, from `tulu_mega`. Its files load without torch, and import nothing from `config`.
        attribute: what each of them defines.
    """
    folder = Path(__file__).parents[1].joinpath(*package.split("."))
    names = sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))
    return {name: getattr(importlib.import_module(f"tulu_mega.{package}.{name}"), attribute) for name in names}
