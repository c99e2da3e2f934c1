"""Whatever our sources use of other libraries' private names, override or replace stands in `platforms.surface`."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from tulu_mega.platforms.surface import SURFACE

PACKAGE = Path(__file__).parents[2] / "tulu_mega"
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
OURS = ("tulu_mega", "tulu_kernels")
DOCUMENTED = {"_exit", "_current_frames", "_asdict", "_fields"}
"""os._exit, sys._current_frames, a named tuple's _asdict and its _fields are public for all their underscore."""
TO_BE_SUBCLASSED = {
    "torch.nn.modules.module.Module", "torch.autograd.function.Function", "torch.optim.optimizer.Optimizer",
    "torch.autograd.function._SingleLevelFunction", "torch.distributed.checkpoint.planner.LoadPlanner",
}  # fmt: skip
"""Classes that say which of their methods a subclass is to have."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


class Found(ast.NodeVisitor):
    """The private names of others in a file, and the attributes of others that it replaces, as (line, name)."""

    def __init__(self, tree: ast.Module):
        self.names: list[tuple[int, str]] = []
        self.replaced: list[tuple[int, str]] = []
        self._foreign: set[str] = set()  # names of imported things
        self._made: set[str] = set()  # names of objects that come from them
        self._own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)} | {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
        }
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in imports:
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and (node.level or module.partition(".")[0] in (*OURS, "__future__")):
                continue
            told = [module, *(alias.name for alias in node.names)]
            self.names += [(node.lineno, part) for name in told for part in name.split(".") if private(part)]
            self._foreign |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        self._foreign -= set(OURS)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                if self._of_a_module(node.value):
                    self._foreign.add(node.targets[0].id)
                elif self._root(node.value) in self._foreign:
                    self._made.add(node.targets[0].id)
            elif isinstance(node, ast.arg) and node.annotation and self._root(node.annotation) in self._foreign:
                self._made.add(node.arg)
        self.visit(tree)

    @staticmethod
    def _root(node: ast.expr) -> str | None:
        while not isinstance(node, ast.Name):
            node = getattr(node, "value", None) or getattr(node, "func", None)
            if not isinstance(node, ast.expr):
                return None
        return node.id

    def _of_a_module(self, node: ast.expr) -> bool:
        """Whether an expression is a module of others, or an attribute in one."""
        while isinstance(node, ast.Attribute):
            node = node.value
        if isinstance(node, ast.Call):
            return ast.unparse(node.func) == "importlib.import_module"
        return isinstance(node, ast.Name) and node.id in self._foreign

    def visit_Attribute(self, node: ast.Attribute) -> None:
        root = self._root(node.value)
        foreign = root in self._foreign | self._made or ast.unparse(node.value) == "super()"
        if private(node.attr) and root not in ("self", "cls") and (foreign or node.attr not in self._own):
            self.names.append((node.lineno, node.attr))
        if isinstance(node.ctx, ast.Store | ast.Del) and self._of_a_module(node.value):
            self.replaced.append((node.lineno, node.attr))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        words = [ast.unparse(node.func), *map(ast.unparse, node.args)] if node.args else [""]
        if any(word in ("getattr", "setattr", "hasattr", "delattr") for word in words[:2]):
            where = next(i for i, word in enumerate(words[:2]) if word.endswith("attr"))
            target, name = node.args[where], node.args[where + 1] if len(node.args) > where + 1 else None
            if isinstance(name, ast.Constant) and private(str(name.value)) and ast.unparse(target) not in ("self", "cls"):
                self.names.append((node.lineno, name.value))
            if words[where] in ("setattr", "delattr") and self._of_a_module(target):
                self.replaced.append((node.lineno, name.value if isinstance(name, ast.Constant) else ast.unparse(node)))
        self.generic_visit(node)


def found(source: str) -> Found:
    return Found(ast.parse(source))


def told(file: str) -> set[str]:
    """All parts of the names that the table has for a file."""
    return {part for name in SURFACE if name.file == file for part in name.name.replace(":", ".").split(".")}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from torch.a import _b", ["_b"]),
        ("from torch._C import c as d", ["_C"]),
        ("import torch\nx = torch.y\nx._z", ["_z"]),
        ("def f(group: 'no', world):\n    return world._get(1).options._timeout", ["_get", "_timeout"]),
        ("from torch import Group\nclass A:\n    def _end(self): self._x = 1\ndef f(it: Group): it._x = it._end", ["_end", "_x"]),
        ("import dist\nclass A:\n    def f(self):\n        o = dist.Options()\n        o._time = self._time = 1", ["_time"]),
        ("class A(B):\n    def _f(self): return super()._f() + self._g()", ["_f"]),
        ("getattr(x, '_y', None)", ["_y"]),
        ("class A:\n    def _f(self): ...\n    def g(self, other): return other._f()", []),
        ("from tulu_mega.x import _y\nimport os\nself._z = __name__.__class__\nos._exit(1)", []),
    ],
)  # fmt: skip
def test_the_finder_finds(source, names):
    assert sorted({name for _line, name in found(source).names} - DOCUMENTED) == names


def test_the_finder_finds_what_is_replaced():
    source = (
        "import torch, importlib, types\ncuda = torch.cuda\ncuda.f = 1\nit = importlib.import_module('m')\nit.x.y = 2\n"
        "stack.callback(setattr, torch, 'compile', 3)\nmade = types.ModuleType('m')\nmade.z = 4\nself.w = 5\n"
    )
    assert sorted(name for _line, name in found(source).replaced) == ["compile", "f", "y"]


@pytest.mark.parametrize("file", FILES)
def test_every_private_name_of_others_is_in_the_table(file):
    it = found((PACKAGE / file).read_text(encoding="utf-8"))
    used = [*it.names, *(it.replaced if file.startswith("platforms/") else ())]
    missing = [f"line {line}: {name}" for line, name in used if name not in DOCUMENTED and name not in told(file)]
    assert not missing, f"tulu_mega/{file} uses what no library promises; say why in tulu_mega/platforms/surface.py: {missing}"


def overrides(module) -> Iterator[tuple[str, str]]:
    """Class and method, for each method by which a class of a module overrides one of another library's."""
    for ours in vars(module).values():
        if not inspect.isclass(ours) or ours.__module__ != module.__name__:
            continue
        for base in ours.__mro__[1:]:
            dotted = f"{base.__module__}.{base.__qualname__}"
            if base.__module__.partition(".")[0] not in ("torch", "megatron", "transformers") or dotted in TO_BE_SUBCLASSED:
                continue
            for method, function in vars(ours).items():
                if inspect.isfunction(function) and method in vars(base) and not method.startswith("__"):
                    yield ours.__name__, method


def test_every_override_is_in_the_table():
    rooms = [file for file in FILES if not file.startswith("vllm_plugin/") and not file.endswith("__main__.py")]
    missing = []
    for file in rooms:
        if any(library in (PACKAGE / file).read_text(encoding="utf-8") for library in ("torch", "megatron", "transformers")):
            module = importlib.import_module(".".join(("tulu_mega", *Path(file).with_suffix("").parts)).removesuffix(".__init__"))
            known = {name.name.replace(":", ".").rpartition(".")[2] for name in SURFACE if name.file == file}
            missing += [f"{file}: {where}.{method}" for where, method in overrides(module) if method not in known]
    assert missing == []


def test_the_table_names_no_file_that_does_not_use_it():
    for name in SURFACE:
        attribute = name.name.replace(":", ".").rpartition(".")[2]
        assert name.file in FILES, f"{name.file} is gone; its lines in platforms/surface.py go as well, or move"
        assert attribute in (PACKAGE / name.file).read_text(encoding="utf-8"), f"{name.file} does not use {name.name} any more"


def test_no_object_changes_its_class():
    """A class of ours comes in through construction: what an object was made as it stays."""
    for file in FILES:
        stores = [
            node
            for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == "__class__"
        ]
        assert not stores, f"tulu_mega/{file}, line {stores[0].lineno}"
