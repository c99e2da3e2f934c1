"""Which command a settings file is for, where nobody says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tulu_mega.config.source import load, parse_toml
from tulu_mega.config.stages import DEFAULT, STAGES
from tulu_mega.errors import UserError


def stages_told(content: Mapping[str, Any], file: str) -> list[str]:
    """The stage that a settings file is for, by what only one has, else by the file's name; none where nothing tells.

    Args:
        content: of the file.
    """
    stages = STAGES.values()
    told = (
        [stage.name for stage in stages if any(_has(content, each) for each in stage.sections)],
        [stage.name for stage in stages if any(_has(content, each) for each in stage.marks)],
        [word for word in _words(file) if word in STAGES],
        [stage.name for stage in stages if any(_has(content, each) for each in stage.hints)],
    )
    return next((names for names in told if len(names) == 1), [])


def command_told(
    file: str, flags: Sequence[str], kinds: Mapping[str, Callable[[], type]], by_rows: Callable[[Any], Sequence[str]]
) -> str:
    """The command that a settings file is for: a stage by what only it has, by the file's name, by what settings it takes, by the
    rows that the file names; another command by its settings, or the file's name. `DEFAULT` where that takes the file as others
    do, and where nothing tells.

    Args:
        flags: laid over the file.
        kinds: the settings of each command that has a file.
        by_rows: the stages that train on rows such as [data] names; none where that cannot be told.

    Raises:
        UserError: several commands take the file, and nothing tells which one is meant.
    """
    try:
        content = parse_toml(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return DEFAULT  # `load` says what is wrong with the file
    taking = [name for name, kind in kinds.items() if not _unknown(kind(), file, flags)]
    stages = [name for name in taking if name in STAGES]
    told = stages_told(content, file)
    if told and (told[0] in stages or not taking):
        return told[0]
    if len(stages) > 1:
        trained = by_rows(content.get("data"))
        stages = [name for name in stages if name in trained] or stages
        if DEFAULT in stages:
            return DEFAULT
    by_name = [name for name in taking or kinds if not {*name.split()}.isdisjoint(_words(file))]
    found = stages or by_name or taking
    if len(found) > 1:
        each = " or ".join(f"tulu-mega check {name} {file}" for name in found)
        raise UserError(f"{file}: several commands take these settings; name the command: {each}")
    return found[0] if found else DEFAULT


def _unknown(kind: type, file: str, flags: Sequence[str]) -> bool:
    """Whether the command has no such settings, or asks for others."""
    try:
        load(kind, file, flags)
    except UserError as error:
        return any(": unknown setting" in problem or ": required, but not given" in problem for problem in error.problems)
    return False


def _words(file: str) -> list[str]:
    return re.split(r"[^a-z]+", Path(file).stem.lower())


def _has(content: Mapping[str, Any], name: str) -> bool:
    """Whether a settings file has a section, or a dotted setting in one."""
    section, _, setting = name.partition(".")
    inside = content.get(section)
    return section in content and (not setting or (isinstance(inside, dict) and setting in inside))
