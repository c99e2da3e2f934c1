"""Documents against the code: links, anchors, commands, flags, blocks of TOML and Python, paths, generated parts."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import tulu_mega
from tulu_mega.cli import CHECK, COMMANDS
from tulu_mega.config import load
from tulu_mega.config.source import parse_toml
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import resolve

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    file
    for file in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *ROOT.glob("tests/*/*.md"),
    ]
    if "measurements" not in file.parts
)
TAUGHT = [file for file in DOCUMENTS if file.name not in ("CHANGELOG.md", "log.md") and "tests" not in file.parts]
"""Documents that tell readers what to do now; the changelog and the log tell what was done then."""
SCRIPTS = ("examples/launch/torchrun.sh", "examples/launch/ssh.sh", "examples/launch/slurm.sbatch", "torchrun.sh")
"""Scripts whose arguments are those of tulu-mega."""
LEFT_OPEN = ("required, but not given", "'NAME'")
"""Problems of settings that a page shows a part of, or with a name that readers choose."""
OF_READERS = re.compile(r"distil|docs/tulu3\.md|archived_dev_scripts")
"""Paths that a page has readers make, and one of open-instruct's repository."""
ELSEWHERE = {"docs/tulu3.md", "docs/performance-summary-archive.md", "docs/source/api-guide/dist_optimizer.md"}
"""Pages of open-instruct and of NVIDIA's repositories."""


def named(files: list[Path]):
    return pytest.mark.parametrize("document", files, ids=lambda file: str(file.relative_to(ROOT)))


@cache
def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def blocks(document: Path, *languages: str) -> list[str]:
    """Fenced blocks of some languages, without the fence's indentation."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text_of(document), re.M | re.S)
    return [textwrap.dedent(body) for _, language, body in found if language in languages]


def programs(document: Path) -> list[str]:
    """Blocks of Python, and what blocks of shell give to ``python -c`` or to its standard input."""
    found = blocks(document, "python")
    for block in blocks(document, "sh", "bash"):
        found += [body for _, body in re.findall(r"python3? -c (['\"])(.*?)\1", block, re.S)]
        found += [body for _, body in re.findall(r"python3? - <<'?(\w+)'?\n(.*?)^\1$", block, re.M | re.S)]
    return found


def without_blocks(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", without_blocks(text_of(document)), re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        slug = "".join(each for each in plain.replace(" ", "-") if each.isalnum() or each in "-_")
        number = next(number for number in range(100) if (f"{slug}-{number}" if number else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


@named(DOCUMENTS)
def test_links_and_anchors_lead_somewhere(document):
    wrong = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", without_blocks(text_of(document))):
        if "://" in target:
            continue
        file = (document.parent / target).resolve() if target else document
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            wrong.append(f"{target}#{anchor}")
    assert wrong == []


def test_every_page_is_reached_from_the_index():
    index = ROOT / "docs/index.md"
    linked = {
        (index.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", text_of(index)) if "://" not in target
    }
    pages = {file for file in (ROOT / "docs").rglob("*.md") if "measurements" not in file.parts} - {index}
    assert pages - linked == set()


@cache
def settings_of(name: str) -> Any:
    """The settings class of a command."""
    return resolve(COMMANDS[name].settings)


def command_lines(document: Path) -> Iterator[list[str]]:
    """The arguments of each call of tulu-mega in blocks of shell, whatever stands before and behind it in its line."""
    for block in blocks(document, "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
            words.whitespace_split = True
            call: list[str] | None = None
            try:
                tokens = list(words)
            except ValueError:  # part of a program in quotes
                continue
            for token in tokens:
                if call is None and (token in ("tulu-mega", *SCRIPTS) or token.endswith("/tulu-mega")):
                    call = []
                elif call is not None and set(token) <= set("();<>|&"):
                    break
                elif call is not None:
                    call.append(token)
            if call:
                yield call


def without_placeholders(call: list[str]) -> tuple[str, list[str]] | None:
    """The command and its arguments; None for a usage line, such as ``tulu-mega COMMAND [config.toml]``."""
    if call[0] in ("COMMAND", "--help", "--version") or any(
        word.startswith("[") and not word.startswith(("['", '["', "[1")) for word in call
    ):
        return None
    if call[0].endswith(".txt"):  # ssh.sh's host file
        call = call[1:]
    if call[0] == CHECK:
        call = [word for word in call[1:] if word not in ("--cluster", "--verify")]
        if not call:
            return None
        if call[0] not in COMMANDS and " ".join(call[:2]) not in COMMANDS:
            file = Path(call[0])
            told = next((name for name in ("rm", "dpo", "grpo", "ppo") if name in file.stem.split("_")), "sft")
            call = [told, *call]
    words = 2 if " ".join(call[:2]) in COMMANDS else 1
    return " ".join(call[:words]), call[words:]


@named(TAUGHT)
def test_commands_and_flags_are_those_of_the_program(document):
    wrong = []
    for call in command_lines(document):
        if (asked := without_placeholders(call)) is None:
            continue
        name, arguments = asked
        if name not in COMMANDS:
            wrong.append(f"{' '.join(call)}: no such command")
            continue
        if "--help" in arguments:
            continue
        command, kind = COMMANDS[name], settings_of(name)
        at = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
        operands, flags = arguments[:at], arguments[at:]
        file = None
        if command.operands:
            flags = [f"--{command.operands}", json.dumps(operands), *flags] if operands else flags
        elif operands:
            assert len(operands) == 1, call
            file = str(ROOT / operands[0]) if (ROOT / operands[0]).exists() else None
        try:
            load(kind, file, flags)
        except UserError as error:
            found = [each for each in error.problems if not any(known in each for known in LEFT_OPEN)]
            wrong += [f"{' '.join(call)}: {each}" for each in found]
    assert wrong == []


@named(TAUGHT)
def test_toml_is_settings_of_a_command(document, tmp_path):
    for number, block in enumerate(blocks(document, "toml")):
        parsed = parse_toml(block)
        file = tmp_path / f"{number}.toml"
        file.write_text(block, encoding="utf-8")
        told: dict[str, list[str]] = {}
        for name in [name for name in COMMANDS if parsed.keys() <= settings_of(name).model_fields.keys()]:
            try:
                load(settings_of(name), str(file))
                told[name] = []
            except UserError as error:
                told[name] = [each for each in error.problems if not any(known in each for known in LEFT_OPEN)]
        assert told, f"no command has all of {', '.join(parsed)}"
        best = min(told, key=lambda name: len(told[name]))
        assert told[best] == [], f"{block}\nas settings of {best}"


@cache
def defined(module: str) -> set[str]:
    """Names at the top of a module of this project, found without importing it."""
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert file.exists(), f"{module}: no such module"
    names: set[str] = set(tulu_mega.PUBLIC) if module == "tulu_mega" else set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
    if path.is_dir():
        names |= {each.stem for each in path.iterdir()}
        names |= set(
            re.findall(r'"(\w+)"', file.read_text(encoding="utf-8"))
        )  # packages that import what they offer when it is asked for
    return names


@named(TAUGHT)
def test_python_compiles_and_imports_what_is_there(document):
    for program in programs(document):
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tulu_mega":
                assert {alias.name for alias in node.names} <= defined(node.module), ast.unparse(node)


@named(TAUGHT)
def test_paths_are_there(document):
    """Paths of this project's folders that a page names, in text and in blocks."""
    found = re.findall(r"(?<![\w/.-])((?:examples|tools|tests|docs|kernels|requirements)/[\w./-]*\w)", text_of(document))
    missing = {path for path in found if not (ROOT / path).exists() and not list(ROOT.glob(f"{path}*"))}
    assert {path for path in missing if not OF_READERS.search(path)} == set()


@named(TAUGHT)
def test_targets_of_make_are_there(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    code = "\n".join([*blocks(document, "sh", "bash"), *re.findall(r"`([^`\n]+)`", without_blocks(text_of(document)))])
    assert set(re.findall(r"\bmake ([a-z-]+)", code)) <= targets


def test_pages_that_code_names_are_there():
    """Messages, comments and settings files that send a reader to a page."""
    missing = []
    for file in (ROOT / folder for folder in ("tulu_mega", "tools", "tests", "examples")):
        for path in chain(file.rglob("*.py"), file.rglob("*.toml"), file.rglob("*.sh"), file.rglob("*.sbatch")):
            text = path.read_text(encoding="utf-8")
            pages = set(re.findall(r"(?<![\w/])docs/[\w/-]+\.md", text)) - ELSEWHERE
            missing += [f"{path.relative_to(ROOT)}: {page}" for page in pages if not (ROOT / page).exists()]
    assert missing == []


def test_generated_parts_are_current():
    spec = importlib.util.spec_from_file_location("generated_docs", ROOT / "tools/generated_docs.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.stale() == [], "run python tools/generated_docs.py"
    assert all(tool.holds(name) for floor in tool.floors() for name in floor)
