"""The effect of a setting on the result of a run. A setting decides the result unless its field says otherwise.

A run directory goes on only with the deciding settings it began with (`preflight.same_run`). A field is marked in its type, and
a section's mark holds for everything in it: ``workers: Annotated[PositiveInt | None, Effect.NONE] = None``.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel


class Effect(Enum):
    """What changes when a setting is another one in the middle of a run."""

    DECIDES = "decides"
    """The result. Settings without a mark have this effect."""
    LENGTH = "length"
    """The number of steps; the steps already done would have been the same where the learning rate does not depend on it."""
    CONTENT = "content"
    """The result, by the content that is named and not by how it is spelt: a file's path, a hub name. The content is pinned
    (`pins`)."""
    NONE = "none"
    """Only rounding, speed, memory, files, output, or when a run gives up."""


def effect_of(settings: type[BaseModel], name: str) -> Effect | None:
    """The effect of a setting.

    Args:
        settings: the class that has it.
        name: its dotted name; names behind a setting that is a table, such as ``data.train.rows.jsonl``, are the table's.

    Returns:
        None where the class has no such setting.
    """
    section: type[BaseModel] | None = settings
    for part in name.split("."):
        if section is None:
            break
        if (field := section.model_fields.get(part)) is None:
            return None
        if marks := [mark for mark in field.metadata if isinstance(mark, Effect)]:
            return marks[-1]
        section = section_of(field.annotation)
    return Effect.DECIDES


def decides(settings: Sequence[type[BaseModel]], name: str) -> Effect:
    """The effect of a setting by the first of the classes that has it.

    A setting that no class has, such as one of an earlier version, has its section's effect; without a section it has none.
    """
    found = next((effect for each in settings if (effect := effect_of(each, name))), None)
    if found is None:
        section = name.rpartition(".")[0]
        return decides(settings, section) if section else Effect.NONE
    return found


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's type names, also where it may be left out; None for a setting."""
    if get_origin(annotation) in (Union, UnionType):
        given = [part for part in get_args(annotation) if part is not type(None)]
        annotation = given[0] if len(given) == 1 else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
