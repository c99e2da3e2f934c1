"""No code asks a settings object what it is: a stage's descriptor, a command or the settings' own class says it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from tulu_mega import cli
from tulu_mega.config import Section
from tulu_mega.config.effects import section_of
from tulu_mega.launch.launcher import resolve

ROOT = Path(__file__).parents[2]
SOURCES = [path for path in sorted((ROOT / "tulu_mega").rglob("*.py")) if "config" not in path.relative_to(ROOT).parts]
ASKS = ("isinstance", "issubclass", "hasattr", "getattr")


def classes() -> dict[str, type[BaseModel]]:
    """Every settings class of a command, and those of its sections, by name."""
    found: dict[str, type[BaseModel]] = {}
    rest = [resolve(command.settings) for command in cli.COMMANDS.values()]
    while rest:
        kind = rest.pop()
        if kind.__name__ not in found:
            found |= {base.__name__: base for base in kind.__mro__ if issubclass(base, Section)}
            rest += [section for field in kind.model_fields.values() if (section := section_of(field.annotation))]
    return found


CLASSES = classes()


def named(code: ast.AST | None) -> set[str]:
    """Settings classes that an annotation or a class argument names."""
    return {name for name in re.findall(r"\w+", ast.unparse(code)) if name in CLASSES} if code else set()


def asked(tree: ast.AST) -> list[str]:
    """Calls that ask a settings object, or about a settings class.

    A settings object is what is named so (``settings``, ``self.settings``, ``plan_settings``), an argument or variable that is
    annotated with a settings class, or a section of a settings object.
    """
    known: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        name = node.arg if isinstance(node, ast.arg) else node.target.id if _annotated(node) else ""
        if name and (kinds := named(node.annotation)):
            known[name] = known.get(name, set()) | kinds

    def kinds_of(node: ast.expr) -> set[str]:
        """Classes that a settings object may have; empty for anything else."""
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "type":
            return kinds_of(node.args[0])
        if isinstance(node, ast.Attribute) and (outer := kinds_of(node.value)):
            fields = [CLASSES[kind].model_fields.get(node.attr) for kind in outer]
            return {section.__name__ for field in fields if field and (section := section_of(field.annotation))}
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        return known.get(name) or (set(CLASSES) if name.lower().endswith("settings") else set())

    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in ASKS]
    return [ast.unparse(call) for call in calls if kinds_of(call.args[0]) or named(call.args[1])]


def _annotated(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(settings, int)",
        "isinstance(settings.train.spike, dict)",
        "hasattr(self.settings, 'rollout')",
        "isinstance(x, config.SftSettings)",
        "isinstance(x, (int, Section))",
        "getattr(settings.train, 'micro_batches', None)",
        "def f(data: DataSettings):\n    isinstance(data, dict)",
        "def f(asked: PlanSettings):\n    getattr(asked, name)",
        "issubclass(type(settings), RunSettings)",
    ],
)
def test_the_finder_finds(code):
    assert len(asked(ast.parse(code))) == 1


def test_the_finder_leaves_values_alone():
    assert asked(ast.parse("isinstance(settings.optim.lr, str)\ngetattr(module, name)\nisinstance(value, dict)")) == []
    assert asked(ast.parse("def f(data: DataSettings):\n    isinstance(data.train, str)")) == []


def test_settings_are_not_asked():
    found = {str(path.relative_to(ROOT)): asked(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {file: calls for file, calls in found.items() if calls} == {}
