"""No code asks a settings object what it is: a stage's descriptor, a command or the settings' own class says it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for path in sorted((ROOT / "tulu_mega").rglob("*.py")) if "config" not in path.relative_to(ROOT).parts]
ASKS = ("isinstance", "issubclass", "hasattr", "getattr")


def typed(annotation: ast.expr | None) -> bool:
    """Whether an annotation names a settings class."""
    return bool(annotation) and re.search(r"(Settings|Section)\b", ast.unparse(annotation)) is not None


def asked(tree: ast.AST) -> list[str]:
    """Calls that ask a settings object, or about a settings class.

    A settings object is what is named so (``settings``, ``self.settings``, ``plan_settings``), an argument or variable that is
    annotated with a settings class, or a section of a settings object.
    """
    known = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg) and typed(node.annotation)}
    known |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and typed(node.annotation)
    }

    def settings(node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id.lower().endswith("settings") or node.id in known
        if isinstance(node, ast.Attribute):
            return node.attr.lower().endswith("settings") or sections(node)
        return isinstance(node, ast.Call) and ast.unparse(node.func) == "type" and settings(node.args[0])

    def sections(node: ast.Attribute) -> bool:
        return node.attr in SECTIONS and settings(node.value)

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ASKS:
            kinds = [each for each in ast.walk(node.args[1]) if isinstance(each, ast.Name | ast.Attribute)]
            classes = [ast.unparse(each).split(".")[-1] for each in kinds]
            if settings(node.args[0]) or any(each.endswith("Settings") or each == "Section" for each in classes):
                found.append(ast.unparse(node))
    return found


def section_names() -> set[str]:
    """Names that sections have in the settings of any command."""
    from tulu_mega import cli
    from tulu_mega.config.effects import section_of
    from tulu_mega.launch.launcher import resolve

    classes = [resolve(command.settings) for command in cli.COMMANDS.values()]
    return {name for each in classes for name, field in each.model_fields.items() if section_of(field.annotation)}


SECTIONS = section_names()


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(settings, int)",
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
    assert asked(ast.parse("isinstance(settings.data.train, str)\ngetattr(module, name)\nisinstance(value, dict)")) == []


def test_settings_are_not_asked():
    found = {str(path.relative_to(ROOT)): asked(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {file: calls for file, calls in found.items() if calls} == {}
