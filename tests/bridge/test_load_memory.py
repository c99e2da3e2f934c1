"""Loading takes the memory of this rank's shard and little more, whatever the size of the checkpoint."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.lib import world
from tulu_mega.config import EngineSettings
from tulu_mega.launch.launcher import World

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
ALLOWED = 256 * 2**20
"""Bytes of anonymous memory beyond the shard and what imports take."""


def bench() -> ModuleType:
    """tools/bench_load.py: its checkpoint of random numbers and its sampler of RssAnon."""
    if "bench_load" not in sys.modules:
        spec = importlib.util.spec_from_file_location("bench_load", ROOT / "tools/bench_load.py")
        sys.modules["bench_load"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["bench_load"])
    return sys.modules["bench_load"]


def write_model(directory: Path, **sizes: int) -> int:
    """A Llama of random numbers; returns the bytes of its files."""
    config = bench().model_config(argparse.Namespace(**sizes, dtype="fp32"))
    config |= {"model_type": "llama", "head_dim": 64, "max_position_embeddings": 256}
    bench().write_checkpoint(directory, config, "fp32")
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def load(directory: Path) -> dict[str, int]:
    """On a rank: the engine is built and the weights loaded, as every command does it; the peak above the state before."""
    from tulu_mega.train.session import opened

    settings = EngineSettings.model_validate({"model": {"path": str(directory), "dtype": "fp32"}, "parallel": {"tensor": 2}})
    rank = int(os.environ["RANK"])
    before = bench().anonymous_bytes()
    with bench().PeakAnonymous() as peak, opened(settings, World(rank, 2, rank, 2, 1), seed=1) as session:
        session.load_weights()
        shard = sum(p.nbytes for chunk in session.engine.chunks for p in chunk.parameters())
    return {"shard": shard, "peak": peak.bytes - before}


def expect_little(directory: Path, **sizes: int) -> None:
    nbytes = write_model(directory, **sizes)
    for rank in world.run(2, load, directory, timeout=600):
        print(json.dumps({"checkpoint": nbytes, **rank, "beyond": rank["peak"] - rank["shard"]}), flush=True)
        assert nbytes / 2 <= rank["shard"] < nbytes * 0.6  # half of it, norms and vocabulary padding on top
        assert rank["peak"] >= rank["shard"]  # the weights are really there
        assert rank["peak"] < rank["shard"] + ALLOWED


@pytest.mark.slow
def test_a_small_checkpoint(tmp_path):
    expect_little(tmp_path / "model", hidden=1024, layers=3, vocab=16384)


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_a_large_checkpoint(tmp_path):
    """4.2 GB, so that a copy of the whole or of half of it could not hide."""
    expect_little(tmp_path / "model", hidden=2048, layers=9, vocab=128256)
