"""What programs may import from `tulu_mega`: names, signatures, and the changelog's line for their last change.

``python tools/public_surface.py "LINE"`` writes tests/house/public_surface.json anew after a change. LINE begins a line of
CHANGELOG.md, and is another one than at earlier changes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path

import tulu_mega

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests/house/public_surface.json"
Definition = ast.ClassDef | ast.FunctionDef | ast.Assign


def definition(target: str) -> tuple[Definition, str]:
    """The node that defines ``module:attribute``, and its docstring; nothing is imported."""
    module, _, attribute = target.partition(":")
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for at, node in enumerate(body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return node, ast.get_docstring(node) or ""
        if isinstance(node, ast.Assign) and [ast.unparse(each) for each in node.targets] == [attribute]:
            after = body[at + 1] if at + 1 < len(body) else None
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            return node, str(text)
        if isinstance(node, ast.ImportFrom) and attribute in [alias.asname or alias.name for alias in node.names]:
            return definition(f"{node.module}:{attribute}")
    raise LookupError(f"{target}: not defined in {file}")


def signatures(node: Definition) -> list[str]:
    """What a caller depends on: a function's parameters; a class's bases, fields and public methods. Settings are not listed by
    field, since docs/reference/settings.md is."""
    if isinstance(node, ast.Assign):
        return [ast.unparse(node.value)]
    if isinstance(node, ast.FunctionDef):
        returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return [f"({ast.unparse(node.args)}){returned}"]
    if node.name.endswith("Settings"):
        return ["settings"]
    lines = []
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and (not each.name.startswith("_") or each.name in ("__init__", "__call__")):
            marks = "".join(f"@{ast.unparse(mark)} " for mark in each.decorator_list)
            lines.append(f"{marks}{each.name}{signatures(each)[0]}")
        elif isinstance(each, ast.AnnAssign | ast.Assign) and not ast.unparse(each).startswith("_"):
            lines.append(ast.unparse(each))
    return lines


def surface() -> dict[str, list[str]]:
    """The signatures of every public name."""
    return {name: signatures(definition(target)[0]) for name, target in tulu_mega.PUBLIC.items()}


def digest(found: dict[str, list[str]]) -> str:
    """A digest of signatures, by which the change of one is noticed."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def main(arguments: list[str]) -> int:
    """Writes the snapshot for the surface as it is now."""
    if len(arguments) != 1 or not arguments[0].strip():
        print('usage: python tools/public_surface.py "the beginning of the line in CHANGELOG.md"', file=sys.stderr)
        return 2
    line, found = arguments[0].strip(), surface()
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"changes": {}}
    if line not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        print(f"error: CHANGELOG.md has no line with {line!r}; write it first", file=sys.stderr)
        return 2
    if known["changes"].get(line, digest(found)) != digest(found):
        print(f"error: {line!r} was the line of another change; write one for this change", file=sys.stderr)
        return 2
    changes = {**known["changes"], line: digest(found)}
    FILE.write_text(json.dumps({"changes": changes, "surface": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
