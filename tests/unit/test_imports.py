"""Modules are imported without garbage collection, megatron-core without what takes seconds; nothing of it stays."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from tulu_mega.imports import uncollected
from tulu_mega.launcher import resolve

LEAN = """
import sys
import torch
from tulu_mega.platforms.lean import import_megatron
before = torch.compile
import_megatron()
assert "megatron.core.tensor_parallel" in sys.modules
assert torch.compile is before and "wandb" not in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules, "something was compiled"
from megatron.core.fusions.fused_bias_swiglu import swiglu
x = torch.randn(3, 8)
gate, up = x.chunk(2, -1)
assert torch.equal(swiglu(x), torch.nn.functional.silu(gate) * up)
"""


def test_nothing_is_collected_meanwhile():
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError), uncollected():
        _ = 1 / 0
    assert gc.isenabled()
    gc.unfreeze()


def test_whoever_has_turned_it_off_finds_it_off():
    gc.disable()
    try:
        assert resolve("json:dumps")([]) == "[]"
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


def test_megatron_is_imported_without_wandb_and_compiler():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LEAN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nanobind" not in done.stderr  # extension modules complain at the end of what was not given back
