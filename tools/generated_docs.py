"""Parts of the documents that are made from the code: `python tools/generated_docs.py` writes them, `--check` compares.

A part lies between the lines ``<!-- generated: NAME -->`` and ``<!-- end -->`` of a document.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import generated_reference as reference  # beside this file, wherever it is called from

ROOT = Path(__file__).resolve().parents[1]
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)


def contracts() -> list[dict]:
    """The import contracts of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]


def floors() -> list[list[str]]:
    """Packages and top-level modules of each floor, the highest floor first."""
    (layers,) = (contract["layers"] for contract in contracts() if contract["id"] == "floors")
    return [[name.strip() for name in floor.split("|")] for floor in layers]


def holds(name: str) -> str:
    """First sentence of the docstring of a package or module of `tulu_mega`."""
    path = ROOT / "tulu_mega" / name
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def architecture() -> str:
    """The table of floors: each floor's packages, and what they hold."""
    rows = ["| floor | package | holds |", "| --- | --- | --- |"]
    numbered = list(enumerate(reversed(floors())))
    for number, names in reversed(numbered):
        rows += [f"| {number} | `{name}` | {holds(name)} |" for name in names]
    return "\n".join(rows)


def contract_list() -> str:
    """The import contracts by name, a line each."""
    return "\n".join(f"- {contract['name']}" for contract in contracts())


PARTS: dict[str, Callable[[], str]] = {
    "architecture": architecture,
    "contracts": contract_list,
    "commands": reference.commands,
    "command_table": reference.command_table,
    "settings": reference.settings,
    "metrics": reference.metrics,
    "exit_statuses": reference.exit_statuses,
    "public_names": reference.public_names,
}


def rendered(document: str) -> str:
    """A document with its generated parts as they are now.

    Raises:
        KeyError: a part's name is unknown.
    """
    return _PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]()}\n{part[3]}", document)


def stale(write: bool = False) -> list[Path]:
    """Documents whose generated parts differ from the code; they are rewritten where asked for."""
    found = []
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]:
        before = file.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            found.append(file)
            if write:
                file.write_text(after, encoding="utf-8")
    return found


if __name__ == "__main__":
    check = "--check" in sys.argv[1:]
    old = stale(write=not check)
    print("\n".join(f"{'stale' if check else 'written'}: {file.relative_to(ROOT)}" for file in old))
    sys.exit(bool(old) and check)
