"""Profiles of a run's steps (`train.profile`): the places of the traces, and the operations that took most time."""

from __future__ import annotations

import json
import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER, OPERATIONS = "profile", "*.operations.json"
SHOWN = 15
"""Operations on the page."""


@dataclass(frozen=True)
class Operation:
    """Calls of one operation in a profile."""

    name: str
    milliseconds: float
    """Time without the operations that it calls."""
    share: float
    """Share of the time of all operations, 0 to 1."""
    calls: int


@dataclass(frozen=True)
class Profile:
    """One rank's profile of some steps."""

    title: str
    device: str
    """device of the times: ``cpu`` or a GPU's type"""
    trace: Path
    """Chrome's JSON, gzipped"""
    operations: list[Operation]
    """Operations, the longest first."""

    def link(self, page: Path) -> str:
        """The trace as a page in a directory refers to it; empty where there is none any more."""
        if not self.trace.is_file():
            return ""
        return urllib.parse.quote(os.path.relpath(self.trace.resolve(), page.resolve()))


def read_profiles(directory: Path, notes: list[str]) -> list[Profile]:
    """The profiles in a run directory, by step and rank.

    Args:
        notes: gets what could not be read.
    """
    found = []
    for file in (directory / FOLDER).glob(OPERATIONS):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            order = (int(content["first_step"]), int(content["last_step"]), int(content["rank"]))
            found.append((order, _profile(content, file.parent, order)))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
            notes.append(f"{FOLDER}/{file.name}: not readable, left out")
    return [profile for _, profile in sorted(found, key=lambda pair: pair[0])]


def _profile(content: dict[str, Any], folder: Path, order: tuple[int, int, int]) -> Profile:
    first, last, rank = order
    total = float(content["microseconds"])
    operations = [
        Operation(
            str(each["name"]),
            float(each["self_microseconds"]) / 1e3,
            float(each["self_microseconds"]) / total if total > 0 else 0.0,
            int(each["calls"]),
        )
        for each in content["operations"]
    ]
    steps = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
    return Profile(f"{steps}, rank {rank}", str(content["device"]), folder / Path(str(content["trace"])).name, operations[:SHOWN])
