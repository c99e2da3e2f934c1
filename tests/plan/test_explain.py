"""`plan --explain`: what it writes can be done again, and gives the plan."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tulu_mega import cli
from tulu_mega.config import ParallelSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.config.recompute import Recomputed, recomputed
from tulu_mega.layout.hardware import GPUS
from tulu_mega.plan.explain import kept_terms, memory_terms, time_terms
from tulu_mega.plan.model.calibration import CALIBRATION, HELD_OUT, HELD_OUT_BF16, RATES
from tulu_mega.plan.model.job import Job, Pack
from tulu_mega.plan.model.kept import token_bytes
from tulu_mega.plan.model.memory import memory_by_rank
from tulu_mega.plan.model.timing import train_step

ROOT = Path(__file__).parents[2]


def content(name: str) -> dict:
    return json.loads((ROOT / "examples/architectures" / name / "config.json").read_text())


def job(model: str, parallel: ParallelSettings, **options) -> Job:
    packs = tuple(Pack(4096 - 8 * at, (512,) * 7, 1800 + at) for at in range(16))
    return Job(content(model), parallel, GPUS["h100"], (packs,) * 2, **options)


JOBS = {
    "one GPU": job("llama3.1_8b", ParallelSettings()),
    "pipeline": job("llama3.1_70b", ParallelSettings(tensor=4, pipeline=4, virtual_pipeline=2)),
    "whole layers": job("llama3.1_70b", ParallelSettings(tensor=8, pipeline=4), recompute=recomputed("full", None)),
    "some layers": job("llama3.1_8b", ParallelSettings(pipeline=2), recompute=recomputed("full", 3)),
    "modules": job("llama3.1_8b", ParallelSettings(tensor=2, context=2), recompute=Recomputed(frozenset({"mlp", "layernorm"}))),
    "OLMo 2": job("olmo2_13b", ParallelSettings(tensor=4), grad_bytes=2, moment_bytes=2),
    "FP8": job("llama3.1_8b", ParallelSettings(tensor=2), fp8=True, entropy=True),
    "no sequence parallelism": job("llama3.1_8b", ParallelSettings(tensor=2, sequence=False)),
    "adapters": job("llama3.1_8b", ParallelSettings(tensor=2), lora=LoraSettings(rank=64)),
    "four bits": job("llama3.1_70b", ParallelSettings(tensor=8), lora=LoraSettings(base_precision="nf4")),
    "DoRA": job("llama3.1_70b", ParallelSettings(tensor=4, pipeline=2), lora=LoraSettings(targets=["q_proj"], dora=True)),
    **{run.name: run.job(content(run.architecture)) for run in CALIBRATION + HELD_OUT + HELD_OUT_BF16},
}


def again(text: str) -> float:
    """Whoever has the line does the arithmetic again."""
    return eval(text.replace(" x ", " * "), {})  # noqa: S307


@pytest.mark.parametrize("name", JOBS)
def test_every_part_is_the_sum_of_its_terms_and_can_be_done_again(name):
    asked = JOBS[name]
    step = train_step(asked, RATES)
    terms = time_terms(asked, step)
    for part, seconds in step.parts.items():
        own = [term for term in terms if term.part == part]
        assert sum(again(term.amount.text) for term in own) == pytest.approx(seconds, rel=5e-3, abs=1e-6), part
    for rank in memory_by_rank(asked, beside=1, bucket=2**28, copies=2 * bool(asked.lora)):
        terms = {term.part: term for term in memory_terms(asked, rank)}
        for part, size in rank.parts.items():
            assert (again(terms[part].amount.text) if size else 0.0) == pytest.approx(size, rel=1e-3), part


@pytest.mark.parametrize("name", JOBS)
def test_what_is_kept_adds_up(name):
    asked = JOBS[name]
    kept = sum(term.amount.value for term in kept_terms(asked))
    left, everything, inputs = token_bytes(asked)
    wanted = inputs if asked.recompute.layers is None else left
    assert kept == pytest.approx(wanted) and wanted <= everything


def test_most_of_a_step_has_a_formula_of_its_own():
    """What is only told as the rest is small where nothing is recomputed and no pipeline waits."""
    asked = dataclasses.replace(JOBS["one GPU"], packs=JOBS["one GPU"].packs[:1])
    step = train_step(asked, RATES)
    explained = sum(term.amount.value for term in time_terms(asked, step) if " " in term.amount.text)
    assert explained == pytest.approx(step.seconds, rel=5e-3)


def test_the_command_explains(capsys):
    flags = ["--gpus", "8", "--model", str(ROOT / "examples/architectures/llama3.1_8b"), "--explain"]
    assert cli.main(["plan", str(ROOT / "examples/tulu3/8b/sft.toml"), *flags]) == 0
    said = capsys.readouterr().out
    for told in ("gate and up", "2 b f / t", "between products", "(share x peak)", "gathers and scatters"):
        assert told in said, told
    assert cli.main(["plan", str(ROOT / "examples/tulu3/8b/sft.toml"), *flags, "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)["explained"]
    assert {term["part"] for term in told["seconds"]} >= {"products", "attention", "elementwise"}
    assert all({"part", "what", "formula", "numbers", "value"} == term.keys() for term in told["memory"])
