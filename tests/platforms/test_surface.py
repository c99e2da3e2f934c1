"""Every name of `platforms.surface` is still there, and the documentation's table is its.

    python -m tests.platforms.test_surface    writes that table
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tulu_mega.platforms.surface import CHECKED, SURFACE, Name

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/explanation/platforms_and_patches.md"
BEGIN, END = "<!-- from tulu_mega/platforms/surface.py -->", "<!-- end -->"


def lookup(dotted: str) -> Any:
    """What a dotted name means: a module, or an attribute of one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(dotted)


def source(module: str) -> str:
    """A module's source. Its package is found, not imported: vLLM takes long."""
    package, *rest = module.split(".")
    (place,) = importlib.util.find_spec(package).submodule_search_locations
    base = Path(place).joinpath(*rest)
    return (base / "__init__.py" if base.is_dir() else base.with_suffix(".py")).read_text(encoding="utf-8")


def named(code: str) -> set[str]:
    """Attributes, variables and strings of a source."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names


@pytest.mark.parametrize("name", SURFACE, ids=lambda name: f"{name.file}:{name.name}")
def test_it_is_still_there(name: Name):
    module, _, attribute = name.name.partition(":")
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package} here")
    if not attribute:
        lookup(module)
    elif name.name.endswith(":_dump_nccl_trace_json"):
        import torch

        if torch.version.cuda is None:
            pytest.skip("torch without NCCL")
        assert hasattr(importlib.import_module(module), attribute)
    else:
        assert attribute in named(source(module)), f"{module} has no {attribute} any more"


def test_what_is_gone_is_noticed():
    with pytest.raises(AttributeError):
        lookup("torch.distributed.distributed_c10d._no_such_name")
    assert "_no_such_name" not in named(source("megatron.core.optimizer.optimizer"))


def test_the_lines_were_read_against_the_releases_of_the_lock():
    lines = [line for line in (ROOT / "requirements/cpu.txt").read_text().splitlines() if "==" in line and line[0] != "#"]
    pins = dict(line.strip().split("==") for line in lines)
    assert {package: pins.get(package) or pins[f"{package}-cpu"] for package in CHECKED} == CHECKED
    assert {name.package for name in SURFACE} <= {*CHECKED, "python"}


def test_no_name_stands_twice():
    assert len({(name.file, name.name) for name in SURFACE}) == len(SURFACE)


def table() -> str:
    """The names as Markdown, by library."""
    lines = []
    for package in (*CHECKED, "python"):
        rows = [name for name in SURFACE if name.package == package]
        if rows:
            lines += ["", f"### {package} {CHECKED.get(package, '(standard library)')}", ""]
            lines += ["| name | how | in | why |", "| --- | --- | --- | --- |"]
            lines += [
                f"| `{row.name}` | {row.use} | `{row.file}` | {row.why}{f' ({row.issue})' if row.issue else ''} |" for row in rows
            ]
    return "\n".join([BEGIN, *lines, "", END])


def written(text: str) -> str:
    """The document with the table of today."""
    before, _, rest = text.partition(BEGIN)
    return before + table() + rest.partition(END)[2]


def test_the_document_has_this_table():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == written(text), "run python -m tests.platforms.test_surface"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
