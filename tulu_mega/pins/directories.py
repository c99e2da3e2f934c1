"""Models and tokenizers in directories: which of the files count, and what they hold."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tulu_mega.bridge.files import peft
from tulu_mega.bridge.files.companions import CONFIG, GENERATION, TOKENIZER
from tulu_mega.bridge.files.hf_files import INDEX, SINGLE
from tulu_mega.bridge.files.hub import is_megatron, model_directory
from tulu_mega.bridge.files.untrusted import read_json
from tulu_mega.errors import UserError
from tulu_mega.pins.digest import read, stamp
from tulu_mega.pins.record import Part, Pin

SMALL = 64 * 2**20
"""Bytes of a file that one process reads on the way; larger ones are left to the ranks, which share them."""
_MORE = ("vocab.txt", "additional_chat_templates/*.jinja")
_MEGATRON = ("*.distcp", ".metadata", "metadata.json", "common.pt")


def files(directory: Path, weights: bool = True, code: bool = False) -> dict[str, Path]:
    """The files that decide what a model, a tokenizer or a directory of low-rank adapters is, by name.

    Args:
        weights: of a model; those of a tokenizer alone otherwise.
        code: Python modules count.
    """
    wanted = [*TOKENIZER, *_MORE, CONFIG, *(["*.py"] if code else [])]
    if (directory / peft.CONFIG).exists() and not (directory / CONFIG).exists():
        wanted, weights = [peft.CONFIG, peft.WEIGHTS], False
    if weights:
        wanted += [GENERATION, *(_MEGATRON if is_megatron(directory) else _weights(directory))]
    found = (file for pattern in wanted for file in directory.glob(pattern) if file.is_file())
    return {str(file.relative_to(directory)): file for file in sorted(found)}


def _weights(directory: Path) -> Iterable[str]:
    """The index and the files that it names, or the one file; whether they are sound is seen elsewhere."""
    try:
        named = read_json(directory / INDEX)["weight_map"].values()
        return [INDEX, *sorted({glob.escape(name) for name in named if name and Path(name).name == name and _possible(name)})]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [INDEX, SINGLE]


def _possible(name: str) -> bool:
    """Whether a file can be called so."""
    return "\0" not in name and len(os.fsencode(name)) < 256


@dataclass(frozen=True)
class Directory:
    """A directory, or hub name, that a setting names."""

    given: str
    """as the setting spells it"""
    weights: bool = True
    """whether it is a model's directory, else a tokenizer's"""
    code: bool = False
    """whether Python modules in it are executed"""


def pin(directory: Directory, before: Pin | None, limit: int | None = SMALL, every: bool = False) -> Pin:
    """What a directory holds.

    Args:
        before: its pin, if there is one: files with a stamp seen there are not read.
        limit: bytes of the largest file that is read; None reads any.
        every: read also what has a known stamp.

    Raises:
        UserError: it cannot be had, or a file cannot be read.
    """
    path_of = model_directory(directory.given)
    parts = {}
    for name, path in files(path_of, directory.weights, directory.code).items():
        try:
            now = stamp(path)
            known = before.parts.get(name) if before else None
            part = parts[name] = Part(f"{name} ({now.size:,} bytes)", None)
            if known and known.digest and now in known.seen and not every:
                part.digest, part.seen = known.digest, [now]
            elif limit is None or now.size <= limit:
                part.digest, seen = read(path)
                part.seen = [seen] if seen else []
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
    return Pin(directory.given, parts, True, revision(path_of))


def revision(directory: Path) -> str | None:
    """The hub's revision that a directory of its cache is of."""
    return directory.name if directory.parent.name == "snapshots" else None
