"""AdamW in main memory, by megatron-core's `optimizer_cpu_offload`: it computes what the device's own does."""

from __future__ import annotations

from itertools import chain

import pytest

from tests.lib import jobs, world
from tests.lib.layouts import size

pytestmark = pytest.mark.ranks

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
MORE = pytest.mark.acceptance


def on_host(fraction: float) -> dict:
    return {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}


def runs(model: str, layout: dict, fraction: float, folder: str) -> tuple[list, list]:
    """By rank, losses and norms of a run in bf16, and of one that goes on from its checkpoints with offload and without."""

    def run(optimizer: dict, first: int = 0, last: int = jobs.RUN, folder: str | None = None) -> list[list]:
        # each in processes of its own: groups that are made anew over one store may find the addresses of those before
        words = (model, layout, first, last, folder, None, "bf16", None, "reshardable", "fp32", optimizer)
        return world.run(size(layout), jobs.series, *words)

    parts = [
        run(on_host(fraction), 0, 2, folder),
        run(on_host(fraction), 2, 3, folder),
        run({}, 3, 4, folder),
        run(on_host(fraction), 4, jobs.RUN, folder),
    ]
    return run({}), [list(chain(*of_a_rank)) for of_a_rank in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("offload") / "model")
    world.run(1, jobs.make_model, directory, True)
    return directory


@pytest.mark.parametrize(
    ("layout", "fraction"),
    [
        ({}, 0.5),
        pytest.param({"data": 2, **OVERLAP}, 0.5, marks=MORE),
        pytest.param({"data": 2, **OVERLAP}, 1.0, marks=MORE),
        pytest.param({"data": 2, "grad_dtype": "bf16"}, 1.0, marks=MORE),
        pytest.param({"tensor": 2, "data": 2}, 0.3, marks=MORE),
        pytest.param({"pipeline": 2, "virtual_pipeline": 2}, 1.0, marks=MORE),
    ],
    ids=str,
)
def test_a_run_is_that_of_the_device_and_goes_on(model, tmp_path, layout, fraction):
    """To the last bit."""
    plain, done = runs(model, layout, fraction, str(tmp_path))
    assert plain == done
