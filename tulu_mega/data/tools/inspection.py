"""What `tulu-mega data inspect` finds, as data: its views draw it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tulu_mega.data.store import Reject


@dataclass(frozen=True)
class Sample:
    """A row as it is trained."""

    where: str
    """file and line"""
    tokens: int
    trained: int
    """tokens that are predicted and trained"""
    cut: int
    """tokens that were cut off"""
    pieces: list[tuple[str, bool]]
    """its text in runs, each with whether it is trained"""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the sequences of the rows that are used."""

    rows: int
    tokens: int
    trained: int
    quantiles: dict[str, float]
    histogram: list[tuple[int, int, int]]
    """``(from, to, sequences)``, both ends included"""


@dataclass(frozen=True)
class Packing:
    """How the run's steps are packed, by some of them."""

    layout: str
    steps: int
    sampled: int
    capacity: int
    """tokens a micro-batch may hold"""
    micro_batches: tuple[int, float, int]
    """on each data-parallel rank in a step: least, mean, most"""
    sequences: float
    """in a micro-batch, mean"""
    padding: tuple[float, float]
    """share of what is computed: over all, and of the worst step"""
    balance: tuple[float, float]
    """share of the ranks' time that is work, by simulation of the schedule: mean, and of the worst step"""


@dataclass(frozen=True)
class Inspection:
    """Everything that the command shows."""

    model: str
    template: str
    told: list[str]
    """what of the rows is not used or changed, and where their turns end: a line each"""
    max_length: int
    sources: list[dict[str, Any]]
    """as :meth:`tulu_mega.data.sources.Rows.sources`, with the rows used and their tokens"""
    rejected: dict[str, int]
    rejects: list[Reject]
    """the first rejected rows; a row that is drawn several times is listed once"""
    truncated: int
    cut: int
    """tokens cut off, over all rows"""
    lengths: Lengths
    packing: Packing
    samples: list[Sample]
