"""The house's rules that import-linter cannot see: what lies at the top, cycles, file lengths, generated documents."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from itertools import chain
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
TOP = {"__init__", "__main__", "agent", "cli", "errors", "process", "records"}
LONGEST = 400
"""Lines of a Python file."""
ELEMENT = 2
"""Dots of a package's name below `tulu_mega`, plus one."""


@cache
def graph() -> grimp.ImportGraph:
    """Imports of `tulu_mega`, those for type checkers too."""
    return grimp.build_graph("tulu_mega", cache_dir=None)


def edges() -> list[tuple[str, str]]:
    found = graph()
    return [(importer, imported) for importer in found.modules for imported in found.find_modules_directly_imported_by(importer)]


def cycles(pairs: list[tuple[str, str]]) -> list[list[str]]:
    """Strongly connected parts of more than one node (Tarjan's algorithm)."""
    after: dict[str, set[str]] = {node: set() for node in chain.from_iterable(pairs)}
    for a, b in pairs:
        after[a].add(b)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(after[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            part, stack[at:] = stack[at:], []
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(after):
        if node not in index:
            visit(node)
    return found


def test_the_cycle_finder_finds():
    assert cycles([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "a")]) == [["a", "b", "c"]]
    assert cycles([("a", "b"), ("b", "c"), ("a", "c")]) == []


def test_no_files_import_each_other_in_a_circle():
    assert cycles(edges()) == []


def test_no_packages_import_each_other_in_a_circle():
    packages = [tuple(".".join(name.split(".")[:ELEMENT]) for name in pair) for pair in edges()]
    assert cycles([(a, b) for a, b in packages if a != b and "tulu_mega" not in (a, b)]) == []


def test_what_lies_at_the_top():
    assert {file.stem for file in (ROOT / "tulu_mega").glob("*.py")} == TOP


def test_the_door_of_the_agent_is_two_statements():
    lines = (ROOT / "tulu_mega/agent.py").read_text(encoding="utf-8").split('"""')[2].split()
    assert " ".join(lines).endswith('if __name__ == "__main__": sys.exit(main(sys.argv[1:]))')


def sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / line for line in listed.stdout.splitlines()]
    if not files:  # an unpacked archive is no checkout
        files = list(chain.from_iterable((ROOT / name).rglob("*.py") for name in ("tulu_mega", "kernels", "tests", "tools")))
    return [file for file in files if file.exists()]


def test_files_have_one_job():
    long = {str(file.relative_to(ROOT)): count for file in sources() if (count := len(file.read_bytes().splitlines())) > LONGEST}
    assert long == {}


@pytest.mark.parametrize(("page", "packages"), [("rows_way", 7), ("weights_way", 6)])
def test_a_way_is_as_it_is_written_down(page, packages):
    """Every file and name of the numbered tables is there; at most 20 files to open, in as few packages as the page says."""
    text = (ROOT / f"docs/explanation/{page}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| `([\w/.]+)` \| ([^|]*)\|", text, re.M)
    for file, names in rows:
        source = (ROOT / "tulu_mega" / file).read_text(encoding="utf-8")
        missing = [name for name in re.findall(r"`(?:\w+\.)*(\w+)`", names) if not re.search(rf"\b{name}\b", source)]
        assert missing == [], file
    files = [file for file, _ in rows]
    assert len(files) == len(set(files)) and 10 < len(files) <= 20
    assert len({file.split("/")[0] for file in files if "/" in file}) <= packages
