"""What `check` has found out about a command so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tulu_mega.errors import UserError

if TYPE_CHECKING:
    from tulu_mega.config import DataSettings, ModelSettings
    from tulu_mega.data.store import TokenStore
    from tulu_mega.pins.compare import Pinning

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """A data set that is to be tokenised before the ranks start."""

    setting: str
    """name of the setting, for messages"""
    data: DataSettings
    model: ModelSettings
    """model whose tokenizer is taken where `data` names none"""
    directory: Path
    """for the ranks to read"""
    look: Callable[[TokenStore], None] = lambda _store: None
    """sees whether what they became fits the other settings; raises UserError"""


@dataclass
class Findings:
    """Problems, in the order in which they were found, and what later checks need of earlier ones."""

    problems: list[str] = field(default_factory=list)
    config: dict[str, Any] | None = None
    """the model's config.json, where it can be used"""
    rows: list[Rows] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """remarks that are no problems, a line each: rows that are left out, fields that are not used"""
    pins: Pinning | None = None
    """inputs that a run that trains depends on"""
    verify: bool = False
    """whether everything that is pinned is read, however it is stamped"""
    starts: bool = False
    """whether the command is about to start: what may come up until it is needed is no problem then"""

    def collect(self, step: Callable[[], T]) -> T | None:
        """What a step returns; None where it raises UserError, whose problems are noted."""
        try:
            return step()
        except UserError as error:
            self.problems.extend(error.problems)
            return None
