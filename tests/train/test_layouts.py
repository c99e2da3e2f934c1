"""Context parallelism, interleaved and uneven pipelines, overlap: like every layout, they never change the mathematics."""

from __future__ import annotations

import numpy as np
import pytest

from tests.lib import jobs, world
from tests.lib.layouts import FEW, check, size, weights

pytestmark = pytest.mark.ranks

PAIRWISE = [  # layout, tied, micro-batches, reduction, recompute
    ("CP2", False, 2, "sum", "none"),
    ("TP2xCP2", True, None, "token_mean", "selective"),
    ("PP2xCP2", True, 3, "sum", "full"),
    ("DP2xCP2", False, 2, "sum", "none"),
    ("TP2xPP2xCP2", True, 2, "token_mean", "none"),
    ("PP2xVPP2", False, 2, "sum", "none"),
    ("PP2xVPP2", True, 4, "token_mean", "full"),
    ("TP2xPP2xVPP2", False, None, "sum", "none"),
    ("PP3", False, 4, "sum", "none"),
    ("PP2 uneven", True, 3, "token_mean", "none"),
]


@pytest.mark.parametrize(("name", "tied", "micro_batches", "reduction", "recompute"), PAIRWISE)
def test_layout_equals_hugging_face(truth, tmp_path, name, tied, micro_batches, reduction, recompute):
    check(truth, tmp_path, name, tied, micro_batches, reduction, recompute, steps=FEW)


STEPS = jobs.RUN


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("layouts") / "model")
    world.run(1, jobs.make_model, directory, False)
    return directory


@pytest.mark.parametrize(
    ("layout", "bucket_size"),
    [
        ({"data": 2}, 5000),
        ({"data": 2, "distributed_optimizer": False}, 5000),
        ({"data": 2, "pipeline": 2}, None),
        ({"context": 2, "pipeline": 2, "virtual_pipeline": 2}, 5000),
    ],
    ids=str,
)
def test_overlap_gives_the_same_bits(model, tmp_path, layout, bucket_size):
    overlap = {"overlap_grad_reduce": True, "bucket_size": bucket_size}
    overlap["overlap_param_gather"] = layout.get("distributed_optimizer", True)
    plain, overlapped = (
        world.run(size(layout), jobs.series, model, {**layout, **more}, 0, STEPS, None, str(tmp_path / name))[0]
        for name, more in (("plain", {}), ("overlapped", overlap))
    )
    assert [loss for loss, _ in overlapped] == [loss for loss, _ in plain]
    # other buckets are other shards of the optimizer, whose squares are added up in another order
    assert [norm for _, norm in overlapped] == pytest.approx([norm for _, norm in plain], rel=1e-6)
    want, got = (weights(str(tmp_path / name)) for name in ("plain", "overlapped"))
    assert want.keys() == got.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"data": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}, {"pipeline": 2, "virtual_pipeline": 2}),
        ({"pipeline": 3}, {"context": 2}),
    ],
    ids=str,
)
def test_a_run_goes_on_under_another_layout(model, tmp_path, before, after):
    stayed = world.run(1, jobs.series, model, {}, 0, STEPS, None, None)[0]
    folder = str(tmp_path / "checkpoints")
    done = world.run(size(before), jobs.series, model, before, 0, 2, folder, None)[0]
    done += world.run(size(after), jobs.series, model, after, 2, STEPS, folder, None)[0]
    np.testing.assert_allclose(done, stayed, rtol=1e-5)
