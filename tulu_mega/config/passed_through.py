"""Tables of settings whose fields go to megatron-core as they are: which it has, read from its source without importing it (or
torch), and which are not for such a table."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tulu_mega.errors import nearest

_SCALARS = {"int": int, "float": (int, float), "bool": bool, "str": str}


@dataclass(frozen=True)
class PassedThrough:
    """A table and the dataclass of megatron-core that its fields are of."""

    table: str
    kind: str
    """the dataclass's name"""
    sources: Mapping[str, str]
    """file below the package `megatron` -> class in it, base classes among them"""
    owned: Mapping[str, str]
    """fields that our own settings decide, and which: to set them twice could only contradict"""
    refused: Mapping[str, tuple[Any, str]]
    """fields with which a run could not work, the value with which it can (None: with none), and why"""
    refused_with: Mapping[str, str] = field(default_factory=dict)
    """beginnings of names that mean something only with a field of `refused`"""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """fields whose type TOML cannot write, and the words that stand for values of it"""

    def fields(self) -> dict[str, str]:
        """Name -> annotation of every field of the installed megatron-core; empty when it is not installed."""
        return _fields(tuple(self.sources.items()))

    def check(self, table: Mapping[str, Any]) -> None:
        """Refuses fields that do not exist, that our settings own, that cannot work, or whose value has another type.

        Raises:
            ValueError: with every problem of the table.
        """
        known = self.fields() if table else {}  # parsing takes most of a second
        problems = []
        for name, value in table.items():
            if name in self.owned:
                problems.append(f"{name} is decided by {self.owned[name]}; set it there")
            elif why := self._refusal(name, value, known):
                problems.append(f"{name} = {value!r} cannot work here: {why}; leave it out")
            elif known and name not in known:
                near = nearest(name, sorted(known))
                owners = [f" ({each} is decided by {setting})" for each, setting in self.owned.items() if repr(each) in near]
                problems.append(f"{name} is not a field of megatron-core's {self.kind}{near}{''.join(owners)}")
            elif name in self.choices:
                if value not in self.choices[name]:
                    problems.append(f"{name} = {value!r}: expected {' or '.join(map(repr, self.choices[name]))}")
            elif known and not _accepts(known[name], value):
                problems.append(f"{name} = {value!r}: megatron-core wants {known[name]}")
        if problems:
            raise ValueError("; ".join(problems))

    def _refusal(self, name: str, value: Any, known: Mapping[str, str]) -> str:
        """Why a value is refused; empty where it is not."""
        if name in self.refused:
            works, why = self.refused[name]
            return "" if works is not None and value == works else why
        begin = next((each for each in self.refused_with if name.startswith(each) and (not known or name in known)), None)
        if begin is None:
            return ""
        first = self.refused_with[begin]
        return f"it means something only with {first}, and for that {self.refused[first][1]}"


@functools.cache
def _fields(sources: tuple[tuple[str, str], ...]) -> dict[str, str]:
    package = importlib.util.find_spec("megatron")  # a namespace package: finding it imports nothing
    fields: dict[str, str] = {}
    for root in (package.submodule_search_locations or []) if package else []:
        for name, kind in sources:
            source = Path(root, name)
            if not source.is_file():
                continue
            for node in ast.parse(source.read_text()).body:
                if isinstance(node, ast.ClassDef) and node.name == kind:
                    for item in node.body:
                        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                            fields[item.target.id] = ast.unparse(item.annotation)
    return fields


def _accepts(annotation: str, value: Any) -> bool:
    """Whether a TOML value can be of the annotated type. Types TOML cannot write (callables, enums) refuse everything."""
    parts = [part.strip() for part in annotation.replace("Optional[", "").rstrip("]").split("|")]
    known = [part for part in parts if part in _SCALARS or part.startswith(("List", "list", "Literal", "Union"))]
    for part in known:
        if part.startswith(("List", "list")):
            if isinstance(value, list):
                return True
        elif part not in _SCALARS:  # Literal and Union: megatron-core's own checks see to the rest
            return isinstance(value, (int, float, str, bool, list))
        elif isinstance(value, bool) == (part == "bool") and isinstance(value, _SCALARS[part]):
            return True
    return False
