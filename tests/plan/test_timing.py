"""Predicted step times: the published runs, and what must hold of any."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega.config import ParallelSettings
from tulu_mega.errors import UserError
from tulu_mega.layout.hardware import GPUS, gpu_named, link
from tulu_mega.plan.model.calibration import CALIBRATION, HELD_OUT, RATES, fit, predicted
from tulu_mega.plan.model.job import Job, Pack
from tulu_mega.plan.model.timing import score_seconds, train_step

ARCHITECTURES = Path(__file__).parents[2] / "examples/architectures"


@cache
def content(name: str) -> dict:
    return json.loads((ARCHITECTURES / name / "config.json").read_text())


def job(parallel: ParallelSettings, data: int = 1, micro_batches: int = 8, tokens: int = 4096, **options) -> Job:
    pack = Pack(tokens, (tokens // 4,) * 4, tokens)
    return Job(content("llama3.1_8b"), parallel, GPUS["h100"], ((pack,) * micro_batches,) * data, **options)


def test_the_stored_rates_are_what_the_calibration_gives():
    found = fit(content)
    assert found.products == pytest.approx(RATES.products, abs=2e-4)
    assert found.tensor_exposed == pytest.approx(RATES.tensor_exposed, abs=2e-3)
    for run in CALIBRATION:
        assert predicted(run, content(run.architecture)) == pytest.approx(run.tflops, rel=1e-3)


@pytest.mark.parametrize("run", HELD_OUT, ids=lambda run: run.name)
def test_published_runs_that_are_not_fitted_to_come_out_within_a_tenth(run):
    assert predicted(run, content(run.architecture)) == pytest.approx(run.tflops, rel=0.1)


@pytest.mark.parametrize(("run", "gflop"), zip(CALIBRATION + HELD_OUT, (51.48, 449.2, 2523, 433.3), strict=True))
def test_model_flops_are_counted_as_published(run, gflop):
    """TFLOP/s over tokens/s: 744 / 14,451, 734 / 1,633 (26.04), 827 / 328, 710 / 1,638."""
    step = train_step(run.job(content(run.architecture)), RATES)
    assert step.flops / step.tokens == pytest.approx(gflop * 1e9, rel=2e-3)


LAYOUTS = st.builds(
    lambda tensor, pipeline, context: ParallelSettings(
        tensor=tensor, pipeline=pipeline[0], virtual_pipeline=pipeline[1], context=context
    ),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2)]),
    st.sampled_from([1, 2]),
)


@settings(max_examples=25, deadline=None)
@given(LAYOUTS, st.sampled_from([1, 2, 4]), st.sampled_from(["none", "selective", "full"]), st.booleans())
def test_parts_are_not_negative_and_the_model_is_never_faster_than_the_peak(parallel, data, recompute, fp8):
    asked = job(parallel, data, recompute=recompute, fp8=fp8)
    step = train_step(asked, RATES)
    assert all(part >= 0 for part in step.parts.values())
    assert step.seconds == pytest.approx(sum(step.parts.values()))
    assert 0 < step.flops_per_gpu < (GPUS["h100"].fp8 if fp8 else GPUS["h100"].bf16)
    assert step.flops == train_step(job(ParallelSettings()), RATES).flops * data
    assert 0 < score_seconds(asked, RATES) < step.seconds


def test_what_costs_more_takes_longer():
    plain = train_step(job(ParallelSettings()), RATES)
    assert train_step(job(ParallelSettings(), recompute="full"), RATES).seconds > plain.seconds
    assert train_step(job(ParallelSettings(), micro_batches=16), RATES).seconds > plain.seconds
    assert train_step(job(ParallelSettings(), fp8=True), RATES).seconds < plain.seconds
    assert train_step(dataclasses.replace(job(ParallelSettings()), gpu=GPUS["a100"]), RATES).seconds > plain.seconds
    two = job(ParallelSettings(pipeline=4), micro_batches=8)
    interleaved = job(ParallelSettings(pipeline=4, virtual_pipeline=2), micro_batches=8)
    assert train_step(interleaved, RATES).idle < train_step(two, RATES).idle
    hidden = ParallelSettings(overlap_grad_reduce=True, overlap_param_gather=True)
    assert train_step(job(hidden, data=16), RATES).data < train_step(job(ParallelSettings(), data=16), RATES).data


def test_links_of_groups():
    gpu = GPUS["h100"]
    assert link(gpu, 8, 1) == link(gpu, 2, 4) == gpu.nvlink
    assert link(gpu, 2, 8) == gpu.network  # one rank of the group in each node
    assert link(gpu, 16, 1) == 8 * gpu.network  # eight: they share the node's eight cards


def test_an_unknown_gpu_is_named():
    with pytest.raises(UserError, match=r"gpu = 'h10'.*did you mean 'h100'.*known: a100, h100, h200, b200"):
        gpu_named("h10")


def test_a_cpu_is_said_not_to_be_planned_for():
    with pytest.raises(UserError, match=r"gpu = 'CPU': what a run on CPUs takes is not predicted, plans are for GPUs \(a100, "):
        gpu_named("CPU")
