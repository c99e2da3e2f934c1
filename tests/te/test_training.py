"""Transformer Engine's optimizer, with megatron-core's around it, and checkpoints of it and of FP8's scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed import jobs, world
from tests.distributed.layouts import size, weights
from tests.distributed.test_training import STEPS, ours, reference
from tests.te.models import make_model
from tulu_mega import checkpoint
from tulu_mega.config import OptimSettings
from tulu_mega.objectives.sft import SftObjective


@pytest.mark.parametrize("layout", [{"data": 2}, {"data": 2, "distributed_optimizer": False}], ids=str)
def test_adamw_equals_torch(tmp_path, layout):
    model, trained = str(tmp_path / "model"), str(tmp_path / "trained")
    world.run(1, jobs.make_model, model, False)
    ((losses, norms, want),) = world.run(1, reference, model, STEPS)
    for got in world.run(size(layout), ours, model, layout, "fp32", trained):
        np.testing.assert_allclose(got, (losses, norms), rtol=1e-4)
    for name, value in weights(trained).items():
        np.testing.assert_allclose(value, want[name], rtol=0, atol=2e-5, err_msg=name)


OPTIM = dict(lr=2e-3, schedule="constant", warmup=0.0, weight_decay=0.1, clip=0.0)


def series(
    directory: str, layout: dict, fp8: str, first: int, last: int, folder: str | None, form: checkpoint.Format = "reshardable"
) -> list[tuple[float, float]]:
    """Losses and norms of steps `first` to `last`; goes on from a checkpoint in the folder and leaves one there."""
    with jobs.session(directory, layout, "bf16", fp8=fp8) as made:
        engine = made.engine
        engine.prepare_training(OptimSettings(**OPTIM), 5)
        assert all(type(each).__module__.startswith("transformer_engine") for each in inner(engine.optimizer))
        if folder and first:
            checkpoint.restore(engine, checkpoint.find(Path(folder))[-1])
        seen = []
        for step in range(first, last):
            batch = jobs.share(made, jobs.sequences(engine.hf.vocab_size, seed=3 + step), 2)
            loss = engine.forward_backward(batch, SftObjective("sum"))
            seen.append((loss.loss, engine.optimizer_step(step, loss.loss).grad_norm))
        if folder:
            checkpoint.save(engine, Path(folder), last, {}, keep=9, format=form)
            engine.settle()
        return seen


def inner(optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers in those of megatron-core."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [each.optimizer for each in chained]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("training") / "model")
    world.run(1, make_model, directory, "wide")
    return directory


TENSOR, INTERLEAVED = {"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}
BOTH = {"tensor": 2, "pipeline": 2}
MORE = pytest.mark.acceptance


@pytest.mark.parametrize(
    ("fp8", "before", "after"),
    [
        ("delayed", TENSOR, TENSOR),
        ("delayed", TENSOR, INTERLEAVED),
        pytest.param("off", {"data": 2, "tensor": 2}, {"data": 2, "tensor": 2}, marks=MORE),
        pytest.param("off", BOTH, INTERLEAVED, marks=MORE),
        pytest.param("blockwise", BOTH, BOTH, marks=MORE),
        pytest.param("blockwise", {"data": 2, "tensor": 2}, INTERLEAVED, marks=MORE),
        pytest.param("delayed", BOTH, {"data": 2, "tensor": 2}, marks=MORE),
    ],
    ids=str,
)
def test_a_run_goes_on(model, tmp_path, fp8, before, after):
    """To the last bit under the same layout. With delayed scaling that takes the largest magnitudes of earlier steps."""
    folder = str(tmp_path / "checkpoints")
    stayed = world.run(size(before), series, model, before, fp8, 0, 5, None)[-1]
    form = "same_layout" if before == after else "reshardable"
    done = world.run(size(before), series, model, before, fp8, 0, 2, folder, form)[-1]
    done += world.run(size(after), series, model, after, fp8, 2, 5, folder)[-1]
    if before == after:
        assert done == stayed
    np.testing.assert_allclose(done, stayed, rtol=5e-3 if fp8 == "off" else 2e-2)
