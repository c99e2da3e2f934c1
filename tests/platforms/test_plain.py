"""TULU_MEGA_PLAIN=1 turns off all that only makes processes and CPUs faster; what comes out is the same."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.invariant.stages import SFT
from tests.lib import sft_runs
from tulu_mega.platforms.cpu_speed import matmul
from tulu_mega.platforms.cpu_speed.served import serves
from tulu_mega.process import PLAIN, uncollected

STEPS = 3


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setenv(PLAIN, "1")


@pytest.mark.timeout(600)
def test_a_run_gives_the_same(plain, tmp_path):
    """float32 products and norms are summed in another order, which float32 rounds otherwise; see tests/invariant/test_sft.py for
    a run with all that makes CPUs faster."""
    SFT.prepare(tmp_path)
    SFT.expect(SFT.trajectory(tmp_path, next(iter(SFT.layouts))), json.loads(SFT.file.read_text()))


def trained(material: Path, run_dir: Path, dtype: str, plain: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of a run of the command line on one rank, and the weights it exports."""
    flags = ["--parallel.tensor", "1", "--parallel.sequence", "false", "--train.log_every", "1", "--model.dtype", dtype]
    words = ["sft", *sft_runs.arguments(material, run_dir, STEPS, every=100), *flags]
    environ = {name: value for name, value in os.environ.items() if name != PLAIN} | ({PLAIN: "1"} if plain else {})
    done = subprocess.run(
        [sys.executable, "-m", "tulu_mega", *words], env=environ, capture_output=True, text=True, timeout=sft_runs.PATIENCE
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warn" not in done.stderr.lower(), done.stderr
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "grad_norm")], load_file(run_dir / "hf/model.safetensors")


@pytest.mark.acceptance
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_exports_the_same(material, tmp_path, dtype):
    """In bf16 all arithmetic is torch's both times: there nothing but the import, the collectives of one rank and the end of the
    process differs, and no bit of it."""
    fast, fast_weights = trained(material, tmp_path / "fast", dtype, plain=False)
    plain, plain_weights = trained(material, tmp_path / "plain", dtype, plain=True)
    assert len(fast) == 2 * STEPS and fast_weights.keys() == plain_weights.keys()
    if dtype == "bf16":
        assert fast == plain
        assert all(torch.equal(fast_weights[name], plain_weights[name]) for name in fast_weights)
        return
    assert fast == pytest.approx(plain, rel=1e-5)
    differences = [float((fast_weights[name] - plain_weights[name]).norm() / plain_weights[name].norm()) for name in fast_weights]
    assert max(differences) < 1e-5


def test_no_tensor_is_served(plain):
    rows, weight = torch.randn(7, 24), torch.randn(40, 24)
    assert not serves(rows)
    assert torch.equal(matmul.times_transposed(rows, weight), rows @ weight.t())


BUILT = """
import importlib, os
from types import SimpleNamespace
import torch
import torch.nn.functional as F
from tulu_mega import platforms
platforms.install()
from tulu_mega.model.norms import RMSNorm
from tulu_mega.platforms.cpu_speed.linear import linear_layers
norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 24)
x = torch.randn(5, 24)
assert torch.equal(norm(x), F.rms_norm(x, (24,), norm.weight, norm.eps))
assert {each.__module__ for each in linear_layers()} == {"megatron.core.tensor_parallel.layers"}
buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
assert not buffers.dist_reduce_scatter_func.__module__.startswith("tulu_mega")
assert not {"LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"} & os.environ.keys()
"""


def test_layers_norms_and_collectives_are_those_of_the_libraries(plain):
    caches = {"LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}  # tests before this one may have set them for themselves
    environ = {name: value for name, value in os.environ.items() if name not in caches}
    command = [sys.executable, "-W", "ignore", "-c", BUILT]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_garbage_is_collected_while_modules_are_imported(plain):
    with uncollected():
        assert gc.isenabled()


def test_a_process_ends_as_python_has_it(plain):
    code = """
from tulu_mega.process import leave
class Torn:
    def __del__(self):
        print("taken apart")
torn = Torn()
leave(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "taken apart\n")
