"""The classes of the judged program of which a test makes objects."""

from __future__ import annotations

import ast
import builtins
import re
import symtable

from tulu_mega.rewards.statements import free_names, prepared

_MAYBE = re.compile(r"\b[A-Z]\w*\s*[(.]")


def classes_asked(statement: str) -> list[str]:
    """Names with a capital that a test calls, or takes attributes of, and neither defines nor imports.

    >>> classes_asked("s = Stack()\\ns.push(1)\\nassert s.pop() == 1"), classes_asked("assert Counter(f(1)) == {}")
    (['Stack'], [])
    """
    if not _MAYBE.search(statement):
        return []
    tree = ast.parse(statement)
    used = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {node.id for node in used if isinstance(node, ast.Name) and node.id[:1].isupper()}
    free = set(free_names(symtable.symtable(statement, "<test>", "exec")))
    known = prepared(statement)["setup"].split()
    return sorted(name for name in names & free if not hasattr(builtins, name) and name not in known)
