"""A save takes of main memory what it must: nothing is gathered, and copies are taken of a rank's own state alone."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.lib import jobs, world
from tulu_mega.train.optimizer_boxes import runs

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "tools/bench_save.py"
VOCAB, HIDDEN = 131072, 64
"""An embedding of 8.4 million elements is almost all of the model."""
ALLOWED = 48 * 2**20
"""Bytes beside what grows with the model: files' buffers, plans, the thread that watches."""


SAVES = ("small", "at once", "behind")


def bench() -> ModuleType:
    """tools/bench_save.py: how the peak is measured."""
    if "bench_save" not in sys.modules:
        spec = importlib.util.spec_from_file_location("bench_save", BENCH)
        sys.modules["bench_save"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["bench_save"])
    return sys.modules["bench_save"]


def peak_of(action: Callable[[], object]) -> dict[str, float]:
    """As the bench's, but memory that is free is not held: how much of it the C library keeps is a matter of chance."""
    ctypes.CDLL(None).malloc_trim(0)
    before = bench().resident("VmRSS")
    found = bench().peak_of(action)
    ctypes.CDLL(None).malloc_trim(0)
    return found | {"stays": bench().resident("VmRSS") - before}


def saved(model: str, layout: dict, directory: str) -> dict[str, dict]:
    """On a rank: what saves take, at once and behind training, and going on from the last."""
    from tulu_mega.config import OptimSettings
    from tulu_mega.train import checkpoint, sharded_save
    from tulu_mega.train.saver import Saver

    found, figures = {}, []
    sharded_save.PIECE = 2**20
    with jobs.session(model, layout, "bf16", load=False) as made:
        engines = {"model": made.engine}
        for chunk in made.engine.chunks:
            for parameter in chunk.parameters():
                parameter.data.normal_(0, 0.02)
        made.engine.prepare_training(OptimSettings(), 2)
        inner = made.engine.optimizer.chained_optimizers[0].optimizer
        state = [value for main in made.engine.optimizer_parameters() for value in (main, *inner.state[main].values())]
        for value in state[1::3] + state[2::3]:  # their memory is there only when it was written to
            value.uniform_()
        for step, name in enumerate(SAVES, 1):  # the first pays for what is imported then
            saver = Saver(engines, Path(directory), 9, "reshardable", name == "behind", figures.append)

            def save(saver=saver, step=step) -> None:
                saver.save(step, {})
                saver.finish()

            found[name] = peak_of(save)
        before = [value.detach().clone() for value in state]
        for value in state:
            value.detach().zero_()
        found["resume"] = peak_of(lambda: checkpoint.restore(engines, checkpoint.find(Path(directory))[-1]))
        assert all(torch.equal(was, value) for was, value in zip(before, state, strict=True))
        held = [parameter.numel() for chunk in made.engine.chunks for parameter in chunk.parameters()]
    return found | {"held": sum(held), "largest": max(held), "told": figures}


@pytest.mark.ranks
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a peak is measured through Linux's /proc")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_takes_no_more_than_it_must(tmp_path, ranks):
    """At once less than main parameters and moments of the largest tensor; behind training a rank's own state besides."""
    model = tmp_path / "model"
    jobs.make_model(str(model), True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB, "hidden_size": HIDDEN}))
    by_rank = world.run(ranks, saved, str(model), {"data": ranks}, str(tmp_path / "checkpoints"))
    for rank, found in enumerate(by_rank):
        print(json.dumps({name: found[name] for name in (*SAVES, "resume")}), flush=True)
        largest, own = 12 * found["largest"], 12 * found["held"] / ranks
        assert found["held"] > VOCAB * HIDDEN
        assert found["at once"]["peak"] < ALLOWED + largest
        assert found["resume"]["peak"] < ALLOWED + largest
        copies = own + (2 * found["held"] if ranks > 1 and rank == 0 else 0)  # alone it has the main parameters of all weights
        assert 0.9 * copies < found["behind"]["peak"] < ALLOWED + largest + copies
        assert all(found[name]["stays"] < own / 2 for name in ("at once", "behind", "resume"))
        assert [each.step for each in found["told"]] == ([] if rank else [1, 2, 3])
        if rank == 0:  # the run's own figures are those that the kernel has, of the rank that has most
            most = max(each["behind"]["peak"] for each in by_rank)
            assert found["told"][2].memory == pytest.approx(most, rel=0.1)
            assert 0 < found["told"][2].waited <= found["told"][2].seconds


@pytest.mark.acceptance
@pytest.mark.timeout(900)
@pytest.mark.parametrize("behind", [[], ["--asynchronous"]], ids=["at once", "behind"])
@pytest.mark.parametrize("layout", [[], ["--data", "2"], ["--tensor", "2"]], ids=["TP1", "DP2", "TP2"])
def test_a_model_of_135_million_parameters(layout, behind):
    told = subprocess.run([sys.executable, BENCH, *layout, *behind], check=True, capture_output=True, text=True).stdout
    print(told, flush=True)
    found = json.loads(told)
    for part in ("save", "again"):
        assert found[part]["peak"] < found["allowed"]
        assert found[part]["stays"] < 256 * 2**20


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_a_run_of_elements_is_boxes_one_after_another(shape, data):
    size = math.prod(shape)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    elements = np.arange(size).reshape(shape)
    boxes = [elements[tuple(slice(at, at + n) for at, n in zip(*box, strict=True))] for box in runs(tuple(shape), start, stop)]
    assert list(itertools.chain.from_iterable(box.flatten() for box in boxes)) == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
