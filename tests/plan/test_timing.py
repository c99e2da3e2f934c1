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
from tulu_mega.config.recompute import recomputed
from tulu_mega.errors import UserError
from tulu_mega.layout.hardware import GPUS, gpu_named, link
from tulu_mega.plan.model.calibration import CALIBRATION, HELD_OUT, HELD_OUT_BF16, OUTSIDE, RATES, fit, predicted
from tulu_mega.plan.model.job import NOTHING, Job, Pack
from tulu_mega.plan.model.timing import score_seconds, train_step

CORE, FULL = recomputed("selective", None), recomputed("full", None)
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


@pytest.mark.parametrize("run", HELD_OUT_BF16, ids=lambda run: run.name)
def test_a_published_run_in_bf16_comes_out_within_15_percent(run):
    """10,456 tokens/s a GPU: the rates were fitted to FP8."""
    found = predicted(run, content(run.architecture))
    assert found == pytest.approx(run.tflops, rel=0.15)
    step = train_step(run.job(content(run.architecture)), RATES)
    assert step.tokens / step.seconds / step.world == pytest.approx(10456, rel=0.15)


@pytest.mark.parametrize("run", OUTSIDE, ids=lambda run: run.name)
def test_a_run_that_was_not_tuned_is_far_slower_than_planned(run):
    """It is here to be seen: no bound holds it, nor is anything fitted to it."""
    assert predicted(run, content(run.architecture)) > 3 * run.tflops


ALL = CALIBRATION + HELD_OUT + HELD_OUT_BF16


@pytest.mark.parametrize(("run", "gflop"), zip(ALL, (51.48, 449.2, 2523, 433.3, 49.03), strict=True))
def test_model_flops_are_counted_as_published(run, gflop):
    """TFLOP/s over tokens/s: 744 / 14,451, 734 / 1,633 (26.04), 827 / 328, 710 / 1,638, 512.7 / 10,456."""
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
@given(LAYOUTS, st.sampled_from([1, 2, 4]), st.sampled_from([NOTHING, CORE, FULL]), st.booleans())
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
    assert train_step(job(ParallelSettings(), recompute=FULL), RATES).seconds > plain.seconds
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
    with pytest.raises(UserError, match=r"gpu = 'h10'.*did you mean 'h100'.*known: a100, h100, h200, b200, gb200, rtx4090"):
        gpu_named("h10")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("A100-80GB", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("H200", "h200"),
        ("RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("GB200-NVL72", "gb200"),
    ],
)
def test_a_gpu_may_be_called_what_its_driver_calls_it(name, known):
    assert gpu_named(name) is GPUS[known]


@pytest.mark.parametrize(("name", "near"), [("A100-40GB", "a100"), ("NVIDIA H100 PCIe", "h100"), ("rtx3090", "rtx4090")])
def test_another_gpu_is_not_taken_for_one_that_is_known(name, near):
    with pytest.raises(UserError, match=f"is not known; did you mean '{near}'"):
        gpu_named(name)


def test_memory_is_what_torch_can_have():
    """Its out-of-memory messages say 79.10 to 79.25 GiB of an A100 80GB or H100, 139.7 to 139.8 of an H200."""
    found = {name: gpu.memory / 2**30 for name, gpu in GPUS.items()}
    assert 79 < found["a100"] < 79.26 and 79 < found["h100"] < 79.2 and 139.7 < found["h200"] < 139.82
    assert link(GPUS["gb200"], 16, 1) == GPUS["gb200"].nvlink  # four to a node, 72 that NVLink joins


def test_a_cpu_is_said_not_to_be_planned_for():
    with pytest.raises(UserError, match=r"gpu = 'CPU': what a run on CPUs takes is not predicted, plans are for GPUs \(a100, "):
        gpu_named("CPU")
