"""RUN_DIR/pins.json: the content that a run began with, and every change of it that was accepted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tulu_mega.errors import UserError
from tulu_mega.launch.run_dir import make_private
from tulu_mega.launch.run_files import write_whole
from tulu_mega.outside.json_input import read_json_text
from tulu_mega.pins.digest import Stamp

PINS = "pins.json"
VERSION = 1
SEEN = 64
"""Stamps that are kept of a file: of its copies on several nodes, and under several names."""


@dataclass
class Part:
    """A file, or a source of rows."""

    shown: str
    """for messages: its name, and how much there is of it"""
    digest: str | None
    """None while nobody has read it"""
    seen: list[Stamp] = field(default_factory=list)
    """stamps of files found to have this content"""

    def saw(self, stamps: list[Stamp]) -> None:
        """Notes further stamps of this content."""
        self.seen = [*self.seen, *(each for each in stamps if each not in self.seen)][-SEEN:]


@dataclass
class Pin:
    """What a setting names."""

    given: str
    """as the setting spelt it last"""
    parts: dict[str, Part]
    directory: bool = False
    """whether the parts are files of a model's or tokenizer's directory"""
    revision: str | None = None
    """revision of a model or data set of the hub"""


@dataclass
class Pins:
    """All of a run, by the setting's dotted name."""

    pins: dict[str, Pin] = field(default_factory=dict)
    accepted: list[dict[str, Any]] = field(default_factory=list)
    day: str | None = None
    """of the first start, which chat templates may write; None of runs that began before it was kept"""

    @classmethod
    def read(cls, run_dir: Path) -> Pins | None:
        """Those of a run directory; None where it has none.

        Raises:
            UserError: the file cannot be read.
        """
        file = run_dir / PINS
        try:
            told = read_json_text(file.read_text(encoding="utf-8"))
            if told["version"] != VERSION:
                raise ValueError(f"version {told['version']}, expected {VERSION}")
            return cls({name: _pin(each) for name, each in told["pins"].items()}, list(told["accepted"]), told.get("day"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}: cannot be read ({error}); it says what this run depends on. Choose another run_dir; or remove the "
                "file, and the run goes on with whatever is there now"
            ) from None

    def write(self, run_dir: Path) -> None:
        """Writes them, whole or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        make_private(run_dir)
        pins = {name: asdict(pin) for name, pin in self.pins.items()}
        told = {"version": VERSION, "day": self.day, "pins": pins, "accepted": self.accepted}
        write_whole(run_dir / PINS, json.dumps(told, indent=1) + "\n")


def first_day(run_dir: Path) -> str | None:
    """The day of a run's first start, where it is known. Raises UserError where the record cannot be read."""
    pins = Pins.read(run_dir)
    return pins.day if pins else None


def _pin(told: Mapping[str, Any]) -> Pin:
    parts = {
        name: Part(each["shown"], each["digest"], [Stamp(*numbers) for numbers in each["seen"]])
        for name, each in told["parts"].items()
    }
    return Pin(told["given"], parts, told["directory"], told["revision"])
