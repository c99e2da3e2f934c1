"""Transformer Engine's optimizer, with megatron-core's around it, and checkpoints of it and of FP8's scales."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.lib import checkpoints, jobs, world
from tests.lib.layouts import size, weights
from tests.standins.transformer_engine.models import make_model
from tests.train.test_training import STEPS, compare, reference
from tulu_mega.bridge.fp8 import in_fp8
from tulu_mega.config import OptimSettings
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.train import checkpoint

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(
    "layout", [{"data": 2}, pytest.param({"distributed_optimizer": False}, marks=pytest.mark.acceptance)], ids=str
)
def test_adamw_equals_torch(tmp_path, layout):
    model = str(tmp_path / "model")
    world.run(1, jobs.make_model, model, False)
    compare(model, world.run(1, reference, model, STEPS)[0], layout, tmp_path / "out")


OFF: dict[str, Any] = {}
DELAYED, BLOCKWISE, TENSORWISE = ({"fp8": recipe} for recipe in ("delayed", "blockwise", "tensorwise"))
KEPT_BLOCKWISE, KEPT_TENSORWISE = ({**each, "fp8_param_gather": True} for each in (BLOCKWISE, TENSORWISE))


def run(layout, precision, model, first=0, last=jobs.RUN, folder=None, out=None, form="reshardable") -> list[tuple[float, float]]:
    """`jobs.series` in bf16 by all ranks."""
    ranks = world.run(size(layout), jobs.series, model, layout, first, last, folder, out, "bf16", precision, form)
    return ranks[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("training") / "model")
    world.run(1, make_model, directory, "wide")
    return directory


DATA, TENSOR, INTERLEAVED = {"data": 2}, {"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}
BOTH, REPLICAS = {"tensor": 2, "pipeline": 2}, {"data": 2, "tensor": 2}
OVERLAP = {**DATA, "overlap_grad_reduce": True, "overlap_param_gather": True}
MORE = pytest.mark.acceptance


@pytest.mark.parametrize(
    ("precision", "before", "after"),
    [
        (KEPT_BLOCKWISE, DATA, DATA),
        pytest.param(DELAYED, TENSOR, TENSOR, marks=MORE),
        pytest.param(DELAYED, TENSOR, INTERLEAVED, marks=MORE),
        pytest.param(OFF, REPLICAS, REPLICAS, marks=MORE),
        pytest.param(OFF, BOTH, INTERLEAVED, marks=MORE),
        pytest.param(BLOCKWISE, BOTH, BOTH, marks=MORE),
        pytest.param(BLOCKWISE, REPLICAS, INTERLEAVED, marks=MORE),
        pytest.param(DELAYED, BOTH, REPLICAS, marks=MORE),
        pytest.param(KEPT_TENSORWISE, REPLICAS, REPLICAS, marks=MORE),
        pytest.param(KEPT_TENSORWISE, REPLICAS, INTERLEAVED, marks=MORE),
    ],
    ids=str,
)
def test_a_run_goes_on(model, tmp_path, precision, before, after):
    """To the last bit under the same layout."""
    folder = str(tmp_path / "checkpoints")
    stayed = run(before, precision, model)
    done = run(before, precision, model, 0, 2, folder, form="same_layout" if before == after else "reshardable")
    done += run(after, precision, model, 2, jobs.RUN, folder)
    if before == after:
        assert done == stayed
    np.testing.assert_allclose(done, stayed, rtol=2e-2 if precision else 5e-3)


AWARE = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
"""Transformer Engine's AdamW with main parameters of its own and moments in bf16"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({**DATA, "grad_dtype": "bf16"}, {**DATA, "grad_dtype": "bf16"}),
        pytest.param(BOTH, DATA, marks=MORE),
        pytest.param(OVERLAP, {}, marks=MORE),
    ],
    ids=str,
)
def test_a_precision_aware_run_goes_on(model, tmp_path, before, after):
    def aware(layout, first=0, last=jobs.RUN, folder=None):
        arguments = (model, layout, first, last, folder, None, "bf16", OFF, "reshardable", "fp32", AWARE)
        return world.run(size(layout), jobs.series, *arguments)[-1]

    stayed, folder = aware(before), str(tmp_path)
    np.testing.assert_allclose(stayed, run(before, OFF, model), rtol=1e-2)
    done = aware(before, 0, 2, folder) + aware(after, 2, jobs.RUN, folder)
    if before == after:
        assert done == stayed
    np.testing.assert_allclose(done, stayed, rtol=5e-3)


@MORE
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_run_with_state_in_main_memory_goes_on(model, tmp_path, fraction):
    """Beside Transformer Engine's AdamW for what stays on the device."""
    table = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}

    def hosted(first=0, last=jobs.RUN, folder=None):
        arguments = (model, OVERLAP, first, last, folder, None, "bf16", OFF, "reshardable", "fp32", table)
        return world.run(2, jobs.series, *arguments)[-1]

    stayed, folder = hosted(), str(tmp_path)
    np.testing.assert_allclose(stayed, run(OVERLAP, OFF, model), rtol=5e-3)
    assert hosted(0, 2, folder) + hosted(2, jobs.RUN, folder) == stayed


def scales(directory: str, layout: dict[str, Any], folder: str, restored: bool) -> dict[str, list[float]]:
    """Delayed scaling's factors and largest magnitudes, by each layer's parts, after two steps or read from their checkpoint."""
    with jobs.session(directory, layout, "bf16", precision=DELAYED) as made:
        engine = made.engine
        engine.prepare_training(OptimSettings(), 2)
        if restored:
            checkpoint.restore({"model": engine}, checkpoint.find(Path(folder))[-1])
        else:
            for step in range(2):
                batch = jobs.share(made, jobs.sequences(engine.hf.vocab_size, seed=3 + step), 2)
                loss = engine.forward_backward(batch, SftObjective("sum"))
                engine.optimizer_step(step, loss.loss)
            checkpoints.save(engine, Path(folder), 2, {}, keep=1)
        found = {}
        for layer in engine.chunks[0].decoder.layers:
            linears = {name: part for name, part in layer.named_modules() if name.rpartition(".")[2].startswith("linear_")}
            for (name, part), way in itertools.product(linears.items(), ("scaling_fwd", "scaling_bwd")):
                state = part.fp8_meta[way]
                values = torch.cat((state.scale, state.amax_history.flatten()))
                found[f"{layer.layer_number}.{name}.{way}"] = values.tolist()
        return found


def test_scaling_history_is_read_under_another_layout(model, tmp_path):
    written = {}
    for rank in world.run(2, scales, model, {"pipeline": 2}, str(tmp_path), False):
        written |= rank
    (read,) = world.run(1, scales, model, {}, str(tmp_path), True)
    assert written == read and any(max(values) > 1.0 for values in written.values())


@pytest.mark.parametrize(
    ("plain", "kept", "layout"),
    [
        (TENSORWISE, KEPT_TENSORWISE, OVERLAP),
        pytest.param(BLOCKWISE, KEPT_BLOCKWISE, DATA, marks=MORE),
        pytest.param(BLOCKWISE, KEPT_BLOCKWISE, REPLICAS, marks=MORE),
        pytest.param(TENSORWISE, KEPT_TENSORWISE, INTERLEAVED, marks=MORE),
    ],
    ids=str,
)
def test_weights_kept_in_fp8_train_as_those_cast_each_step(model, tmp_path, plain, kept, layout):
    """Losses are the same to the last bit. What is exported is what the products were of."""
    outs = [str(tmp_path / name) for name in ("plain", "kept")]
    seen = [run(layout, precision, model, out=out) for precision, out in zip((plain, kept), outs, strict=True)]
    assert [loss for loss, _ in seen[0]] == [loss for loss, _ in seen[1]]
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-6)
    whole, cast = map(weights, outs)
    assert whole.keys() == cast.keys()
    for name, value in whole.items():
        matrix = name.endswith("_proj.weight")
        away = np.linalg.norm(cast[name] - value) / np.linalg.norm(value)
        assert 0.02 < away < 0.035 if matrix else away == 0.0, f"{name}: {away}"


def settling(directory: str, precision: dict[str, Any], settles: bool) -> list[float]:
    """Losses of steps with overlap, between which parameters are read, as a save and servers do."""
    with jobs.session(directory, OVERLAP, "bf16", precision=precision) as made:
        engine = made.engine
        engine.prepare_training(OptimSettings(lr=2e-3, schedule="constant", warmup=0.0, eps=1e-3), 4)
        losses = []
        for step in range(4):
            batch = jobs.share(made, jobs.sequences(engine.hf.vocab_size, seed=3 + step), 2)
            losses.append(engine.forward_backward(batch, SftObjective("sum")).loss)
            engine.optimizer_step(step, losses[-1])
            if settles:
                engine.settle()
        return losses


@pytest.mark.parametrize("precision", [KEPT_TENSORWISE, KEPT_BLOCKWISE], ids=str)
def test_reading_parameters_between_steps_changes_nothing(model, precision):
    """Their transposed bytes, which the backward pass reads, are the updated ones too."""
    left, read = (world.run(2, settling, model, precision, settles) for settles in (False, True))
    assert left == read


@MORE
def test_a_run_goes_on_with_weights_in_fp8_or_without(model, tmp_path):
    folder = str(tmp_path / "checkpoints")
    stayed = run(DATA, KEPT_BLOCKWISE, model)
    done = run(DATA, KEPT_BLOCKWISE, model, 0, 2, folder)
    done += run({}, OFF, model, 2, 3, folder)
    done += run(TENSOR, KEPT_TENSORWISE, model, 3, jobs.RUN, folder)
    np.testing.assert_allclose(done, stayed, rtol=3e-2)


def packed_in_blocks(directory: str) -> list[bool]:
    """Whether what goes to a server in FP8 blocks is that of the values of each matrix."""
    from tulu_kernels.fp8_blocks import Piece, plan_pack

    from tulu_mega.bridge import fp8

    found = []
    with jobs.session(directory, {}, "bf16", precision=KEPT_BLOCKWISE) as made:
        for parameter in filter(in_fp8, made.engine.chunks[0].parameters()):
            extent = tuple((0, length) for length in parameter.shape)
            plan = plan_pack([Piece("", tuple(parameter.shape), extent, extent)])
            plain = fp8.packed(parameter.dequantize(dtype=torch.bfloat16), plan)
            bytes_of = parameter._rowwise_data.view(torch.float8_e4m3fn).float()
            sent = fp8.packed(parameter, plan)
            same = (sent[: plan.bytes].view(torch.float8_e4m3fn).float() == bytes_of.flatten()).float().mean()
            found.append(bool(torch.equal(sent, plain)) and float(same) > 0.999)
    return found


def test_servers_get_the_bytes_that_are_kept(model):
    found = world.run(1, packed_in_blocks, model)[0]
    assert found and all(found)
