"""How gradients are added up over replicas: overlap changes no bit, and what bf16 changes is bf16's rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.lib import jobs, world
from tests.lib.layouts import size
from tulu_mega.config import OptimSettings

pytestmark = pytest.mark.ranks

MORE = pytest.mark.acceptance


def series(model: str, layout: dict, dtype: str, moments: str = "fp32") -> list[tuple[float, float]]:
    return world.run(size(layout), jobs.series, model, layout, 0, jobs.RUN, None, None, dtype, None, "reshardable", moments)[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("reduction") / "model")
    world.run(1, jobs.make_model, directory, True)
    return directory


@pytest.mark.parametrize(
    "layout",
    [{"data": 2}, pytest.param({"data": 2, "pipeline": 2}, marks=MORE), pytest.param({"data": 2, "tensor": 2}, marks=MORE)],
    ids=str,
)
def test_overlap_changes_no_bit(model, layout):
    """With gradients and moments in bf16; `test_layouts` has it with float32's."""
    plain = {**layout, "grad_dtype": "bf16"}
    overlap = {**plain, "overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 5000}
    want, got = (series(model, each, "bf16", "bf16") for each in (plain, overlap))
    assert [loss for loss, _ in got] == [loss for loss, _ in want]
    assert [norm for _, norm in got] == pytest.approx([norm for _, norm in want], rel=1e-6)


def gradients(model: str, layout: dict) -> tuple[str, float, dict[str, np.ndarray]]:
    """Type and norm of the gradients of a step, and they themselves."""
    with jobs.session(model, layout, "bf16") as made:
        made.engine.prepare_training(OptimSettings(name="sgd", lr=0.0, clip=0.0), 1)
        from tulu_mega.objectives.sft import SftObjective

        micro = jobs.share(made, jobs.sequences(made.engine.hf.vocab_size), 2)
        loss = made.engine.forward_backward(micro, SftObjective("sum"))
        held = {name: each.main_grad for name, each in made.engine.chunks[0].named_parameters()}
        (kind,) = {str(each.dtype) for each in held.values()}
        found = {name: each.float().numpy().copy() for name, each in held.items()}
        return kind, made.engine.optimizer_step(0, loss.loss).grad_norm, found


@pytest.mark.parametrize("layout", [{"data": 2}, pytest.param({"tensor": 2}, marks=MORE), pytest.param({}, marks=MORE)], ids=str)
def test_gradients_in_bf16_are_those_of_float32_rounded(model, layout):
    fine, coarse = (world.run(size(layout), gradients, model, {**layout, "grad_dtype": dtype})[-1] for dtype in ("fp32", "bf16"))
    assert (fine[0], coarse[0]) == (str(torch.float32), str(torch.bfloat16))
    assert coarse[1] == pytest.approx(fine[1], rel=5e-3)
    for name, value in fine[2].items():
        assert np.linalg.norm(coarse[2][name] - value) <= 0.01 * np.linalg.norm(value), name
