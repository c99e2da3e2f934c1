"""What pages name in their text and call in their programs, against the code: settings, flags, commands, keywords, methods."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.house.test_documents import ROOT, TAUGHT, blocks, named, programs, settings_of, text_of, without_blocks
from tulu_mega.cli import CHECK, COMMANDS
from tulu_mega.config import describe

LANGUAGES = {"sh", "bash", "python", "toml", "json", "yaml"}
"""Languages of blocks; tests read the first four. Output and drawings have none."""
TABLES = {"tasks", "rewards.custom", "rewards.aliases", "megatron", "ddp", "optimizer", "te"}
"""Sections whose keys readers or other libraries choose."""
OPTIONS = {"help", "version", "cluster", "verify", "dry_run"}
"""Flags of the command line that are no settings, with `_` for `-`."""
OF_OTHERS = {"max-restarts", "api-key", "cpu-bind", "cpus-per-task", "signal", "no-deps", "revision", "limit"}
"""Flags of torchrun, vLLM, Slurm, pip, the hub's client and lm-evaluation-harness."""
NEW_STAGE = "distil"
"""The stage that docs/how-to/add_a_stage.md has its readers add."""
FILES = ("gguf", "safetensors", "toml", "json", "jsonl", "html", "log", "py", "md", "csv", "png")
MATRICES = "model.layers."
"""What names of a model's matrices begin with, which are no settings of [model]."""
OTHER_PROGRAMS = "recipes_vs_ai2.md"
"""The page that sets other programs' flags beside ours."""


@cache
def settings() -> set[str]:
    """Dotted settings of all commands, and their sections."""
    found = {row[0] for name in COMMANDS for row in describe(settings_of(name))}
    return {".".join(parts[:end]) for parts in (each.split(".") for each in found) for end in range(1, len(parts) + 1)}


@cache
def options_of_tools() -> set[str]:
    """Flags that programs under tools/ and tests/ define."""
    return {
        flag
        for file in (ROOT / "tools").rglob("*.py")
        for flag in re.findall(r'add_argument\(\s*"--([\w-]+)"', file.read_text(encoding="utf-8"))
    }


def spans(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_blocks(text_of(document)))


def is_setting(dotted: str) -> bool:
    parts = dotted.split(".")
    return dotted in settings() or any(".".join(parts[:end]) in TABLES for end in range(1, len(parts)))


def is_module_or_file(dotted: str) -> bool:
    at = (ROOT / "tulu_mega").joinpath(*dotted.split("."))
    return dotted.endswith(FILES) or any(each.with_suffix(".py").exists() or each.is_dir() for each in (at, at.parent))


@named(TAUGHT)
def test_dotted_names_are_settings_or_modules(document):
    """A name in backquotes that begins with a section, such as `train.steps`."""
    sections = {each.partition(".")[0] for each in settings() if "." in each}
    dotted = re.compile(r"(?<![\w./-])[a-z][a-z_\d]*(?:\.[a-z_\d]+)+(?![\w(/]|\.\w)")
    found = {name for span in spans(document) for name in dotted.findall(span)}
    asked = {each for each in found if each.partition(".")[0] in sections and not each.startswith(MATRICES)}
    assert {each for each in asked if not is_setting(each) and not is_module_or_file(each)} == set()


@named([file for file in TAUGHT if file.name != OTHER_PROGRAMS])
def test_flags_in_text_are_those_of_a_program(document):
    found = {flag for span in spans(document) for flag in re.findall(r"(?<![^\s(])--([A-Za-z][\w.-]*\w)", span)}
    ours = {flag for flag in found if is_setting(flag.replace("-", "_")) or flag.replace("-", "_") in OPTIONS}
    assert found - ours - options_of_tools() - OF_OTHERS == set()


@named(TAUGHT)
def test_commands_in_text_are_there(document):
    calls = [span.split()[1:3] for span in spans(document) if span.startswith("tulu-mega ")]
    known = {*COMMANDS, CHECK, NEW_STAGE}
    wrong = [each for each in calls if not (each[0] in known or " ".join(each) in known or re.match(r"[A-Z-]|\.\.\.", each[0]))]
    assert wrong == []


@named(TAUGHT)
def test_blocks_are_of_languages_that_are_checked(document):
    assert set(re.findall(r"^ *```(\w+)", text_of(document), re.M)) <= LANGUAGES
    unmarked = [block for block in blocks(document, "") if re.search(r"^(\$ )?(tulu-mega|make) ", block, re.M)]
    assert [block for block in unmarked if NEW_STAGE not in block] == [], "mark the block as sh"


@cache
def surface() -> dict[str, list[str]]:
    return json.loads((ROOT / "tests/house/public_surface.json").read_text(encoding="utf-8"))["surface"]


def _wrong_calls(program: ast.AST) -> Iterator[str]:
    """Keywords and methods of public names that are not in the committed surface."""
    public = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(program)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tulu_mega"
        for alias in node.names
        if alias.name in surface() and surface()[alias.name] != ["settings"]
    }
    made: dict[str, str] = {}  # variable -> public name of its class
    for node in ast.walk(program):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and (name := public.get(node.func.id)):
            told = "\n".join(surface()[name])
            unknown = [each.arg for each in node.keywords if each.arg and not re.search(rf"\b{each.arg}\b[:=]", told)]
            yield from (f"{name}({keyword}=)" for keyword in unknown)
        for target, value in _bindings(node):
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in public:
                made[target] = public[value.func.id]
    for node in ast.walk(program):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = made.get(node.value.id, "")
            if name[:1].isupper() and not re.search(rf"\b{node.attr}\b", "\n".join(surface()[name])):
                yield f"{name}.{node.attr}"


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.With):
        yield from ((item.optional_vars.id, item.context_expr) for item in node.items if isinstance(item.optional_vars, ast.Name))
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        yield node.targets[0].id, node.value


@named(TAUGHT)
def test_programs_call_public_names_as_they_are(document):
    assert [wrong for program in programs(document) for wrong in _wrong_calls(ast.parse(program))] == []


@pytest.mark.parametrize(
    ("program", "wrong"),
    [
        ("from tulu_mega import VerifierPool as P\nwith P(s, ['a'], workerz=1) as p: pass", ["VerifierPool(workerz=)"]),
        ("from tulu_mega import VerifierPool\nwith VerifierPool(s, ['a']) as p:\n    p.judged([])", ["VerifierPool.judged"]),
    ],
)
def test_a_wrong_keyword_or_method_is_found(program, wrong):
    assert list(_wrong_calls(ast.parse(program))) == wrong
