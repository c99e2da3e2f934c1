"""Importing our modules changes nothing in a process but its modules; `platforms.prepare_imports` changes what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

IMPORTS = """
import ast, importlib, os, sys, warnings
from pathlib import Path

names, foreign = [], set()
for path in sorted(Path(ROOT, "tulu_mega").rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    top = ast.parse(path.read_text()).body
    theirs = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    theirs |= {node.module for node in top if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    theirs = {each for each in theirs if each.partition(".")[0] not in ("tulu_mega", "__future__")}
    if path.name == "__main__.py" or any(each.partition(".")[0] == "vllm" for each in theirs):
        continue  # a program, or a module of vLLM's processes alone
    names.append(name)
    foreign |= theirs
for name in sorted(foreign):  # what they do to a process is theirs
    importlib.import_module(name)

def state():
    import torch
    return {
        "torch.compile": torch.compile, "current_device": torch.cuda.current_device, "Tensor.cuda": torch.Tensor.cuda,
        "filters": list(warnings.filters), "environ": dict(os.environ), "wandb": sys.modules.get("wandb", "absent"),
    }

before = state()
for name in names:
    importlib.import_module(name)
assert "tulu_mega.recipes.grpo" in sys.modules and "tulu_mega.platforms.cpu_speed.matmul" in sys.modules
after = state()
changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
assert not changed, changed
"""

QUIET = """
import sys
import torch
from tulu_mega.platforms import prepare_imports
compiler = torch.compile
prepare_imports()
prepare_imports()
assert "megatron.core.tensor_parallel" in sys.modules and torch.compile is compiler and "wandb" not in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules, "something was compiled"
from megatron.core.fusions.fused_bias_swiglu import swiglu
x = torch.randn(3, 8)
gate, up = x.chunk(2, -1)
assert torch.equal(swiglu(x), torch.nn.functional.silu(gate) * up)
import tulu_mega.recipes.grpo
assert "wandb" not in sys.modules
"""


@pytest.mark.timeout(300)
def test_imports_have_no_side_effects():
    code = f"ROOT = {str(Path(__file__).parents[2])!r}\n{IMPORTS}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_prepared_process_imports_recipes_quietly():
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
