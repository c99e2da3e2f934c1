"""The owners of a test's names: the test itself, its prompt, Python, or the judged program."""

from __future__ import annotations

import ast
import builtins
import functools
import re
import symtable
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tulu_mega.rewards.fences import fenced_blocks

_KNOWN = {
    **dict.fromkeys(("Counter", "OrderedDict", "defaultdict", "deque"), "collections"),
    **dict.fromkeys(("isclose", "inf", "nan", "pi", "sqrt"), "math"),
    **dict.fromkeys(("date", "datetime", "timedelta"), "datetime"),
    **dict.fromkeys(("islice", "permutations", "combinations", "product", "chain"), "itertools"),
    **dict.fromkeys(("List", "Dict", "Tuple", "Set", "Optional", "Any", "Union", "Callable"), "typing"),
    "Decimal": "decimal",
    "Fraction": "fractions",
    "reduce": "functools",
    "deepcopy": "copy",
}
"""Names of the standard library that tests use without importing them."""
_OTHERS = {"np": "numpy as np", "numpy": "numpy"}
_MOST_STARTS = 50


def prepared(statement: str, prompt: str = "") -> dict[str, Any]:
    """The test as the sandbox takes it: ``statement``, ``setup`` to run before it, and ``theirs``.

    Free names of the statement are looked for in this order: modules of the standard library that it takes attributes of,
    well-known names of these, functions and constants that the prompt defines in full (where it asks for others), the program.
    ``theirs`` are names of Python's own, such as ``sum``, that the program is asked to define.

    Args:
        prompt: what the model was asked, in which code may stand.
    """
    table, tree = symtable.symtable(statement, "<test>", "exec"), ast.parse(statement)
    free = {name for name in free_names(table) if not name.startswith("__")}
    passed = _passed(tree, table)
    trees = _trees(prompt)
    whole, unfinished = _functions(trees)
    python = {name for name in free if hasattr(builtins, name)}
    modules = {name for name in free - python - _called_or_alone(tree) if name in sys.stdlib_module_names or name in _OTHERS}
    rest = free - python - modules
    known = {name for name in rest & _KNOWN.keys() if rest - _KNOWN.keys() and name not in passed | unfinished.keys()}
    imports = [f"import {_OTHERS.get(name, name)}" for name in sorted(modules)]
    imports += [f"from {_KNOWN[name]} import {name}" for name in sorted(known)]
    rest -= known
    constants = _constants(trees)
    given = whole.keys() | constants.keys()
    theirs = python & unfinished.keys()
    if not (rest - given or rest & passed):  # else what is passed beside it, such as a type, is Python's
        functions = {name for name in python & passed if not isinstance(getattr(builtins, name), type)}
        theirs |= functions or python & passed
    helpers = rest & given - passed if (rest & passed) or rest - given or theirs else set()
    if not rest and not theirs and len(python & _called(tree)) == 1:
        theirs = python & _called(tree)
    setup = _setup(imports, helpers, {**constants, **whole}, trees)
    return {"statement": statement, "setup": setup, "theirs": sorted(theirs)}


def free_names(table: symtable.SymbolTable) -> Iterator[str]:
    """Names that are read of the module without being bound there."""
    bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    tables = [table]
    while tables:
        scope = tables.pop()
        tables += scope.get_children()
        for symbol in scope.get_symbols():
            at_top = scope is table or symbol.is_global()
            if at_top and symbol.is_referenced() and symbol.get_name() not in bound:
                yield symbol.get_name()


def _passed(tree: ast.Module, table: symtable.SymbolTable) -> set[str]:
    """Names that are given to a function of the test itself, as in ``check(add)``."""
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    given = {part.id for call in calls if call.func.id in own for part in call.args if isinstance(part, ast.Name)}
    return given & set(free_names(table))


def _called(tree: ast.Module) -> set[str]:
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def _called_or_alone(tree: ast.Module) -> set[str]:
    """Names that are used other than for their attributes."""
    bases = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in bases}


@functools.lru_cache(maxsize=8)
def _trees(prompt: str) -> tuple[ast.Module, ...]:
    """The code of a prompt, parsed once for all of its tests. Nobody changes the trees."""
    return tuple(_code(prompt)) if prompt else ()


def _code(prompt: str) -> Iterator[ast.Module]:
    """The code of a prompt: its fenced blocks, else what follows the first line from which on all is code."""
    blocks = [code for _, code in fenced_blocks(prompt)]
    if not blocks:
        lines = prompt.split("\n")
        starts = [number for number, line in enumerate(lines) if re.match(r"(def|async def|import|from|class|@)\b", line)]
        for start in starts[:_MOST_STARTS]:
            tree = _parsed("\n".join(lines[start:]))
            if tree is not None:
                yield tree
                return
    for code in blocks:
        tree = _parsed(code)
        if tree is not None:
            yield tree


def _parsed(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _functions(trees: Sequence[ast.Module]) -> tuple[dict[str, ast.stmt], dict[str, ast.stmt]]:
    """The functions that a prompt defines: in full, and by their head alone."""
    found = {node.name: node for tree in trees for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    unfinished = {name: node for name, node in found.items() if all(map(_is_nothing, node.body))}
    return {name: node for name, node in found.items() if name not in unfinished}, unfinished


def _constants(trees: Sequence[ast.Module]) -> dict[str, ast.stmt]:
    """The names to which a prompt gives a literal."""
    return {name: node for tree in trees for node in tree.body for name in _assigned(node)}


def _assigned(node: ast.stmt) -> list[str]:
    """The names that a statement gives a literal; none where it does something else."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None or not _is_literal(node.value):
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def _is_nothing(node: ast.stmt) -> bool:
    """A docstring, ``pass``, ``...`` or ``raise NotImplementedError``."""
    if isinstance(node, ast.Raise):
        named = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return isinstance(named, ast.Name) and named.id == "NotImplementedError"
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _setup(imports: list[str], helpers: set[str], whole: dict[str, ast.stmt], trees: Sequence[ast.Module]) -> str:
    """Source of what the test takes from elsewhere; a helper comes with the functions, imports and constants it uses.

    Args:
        whole: functions and constants of the prompt.
    """
    wanted, open_names = set(helpers), list(helpers)
    while open_names:
        used = {node.id for node in ast.walk(whole[open_names.pop()]) if isinstance(node, ast.Name)}
        for name in used - wanted:
            wanted.add(name)
            if name in whole:
                open_names.append(name)
    parts: list[str] = []
    if helpers:
        for node in (node for tree in trees for node in tree.body):
            importing = isinstance(node, (ast.Import, ast.ImportFrom)) and _importable(node)
            constant = not wanted.isdisjoint(_assigned(node))
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name in wanted & whole.keys()
            if importing or constant or function:
                parts.append(ast.unparse(node))
    return "\n".join([*imports, *parts])


def _importable(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        names = [node.module or ""] if not node.level else [""]
    else:
        names = [alias.name for alias in node.names]  # type: ignore[attr-defined]
    return all(name.split(".")[0] in sys.stdlib_module_names for name in names)


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True
