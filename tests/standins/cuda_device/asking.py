"""A process that runs `steps`, asked case by case, and what its answers have to be."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lib import world
from tests.standins.cuda_device import device

NORM = "clip_grads.py:get_grad_norm_fp32"
COUNT = "finalize_model_grads.py:finalize_model_grads"
"""megatron-core looks whether any token counts, in each model chunk"""
METRICS = "engine.py:_reduce"
"""loss and metrics of all micro-batches, which a real device gives in one or two reads"""


@contextlib.contextmanager
def asking(directory: Path, *options: str) -> Iterator[Callable[[dict], dict]]:
    """Gives what answers a case.

    Args:
        directory: a new one, for what is compiled and logged.
        options: see `steps.main`.
    """
    if torch.version.cuda:
        pytest.skip("torch was built for CUDA: tests/gpu and make gpu-smoke run on the real thing")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler for what stands in for CUDA's device guard")
    line = [sys.executable, "-m", "tests.standins.cuda_device.steps", str(device.build(directory, compiler)), *options]
    with open(directory / "log", "w+") as log:
        process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

        def answer(case: dict) -> dict:
            print(json.dumps(case), file=process.stdin, flush=True)
            told = process.stdout.readline()
            log.seek(0)
            assert told, f"ended:\n{log.read()[-4000:]}"
            return json.loads(told)

        with process:
            yield answer
            process.kill()


def saved_models(factory: pytest.TempPathFactory, make_model: Callable[[str, str], None]) -> Callable[[str], str]:
    """Gives the directory of a kind's model, made by `make_model` the first time."""

    @functools.cache
    def saved(kind: str) -> str:
        directory = str(factory.mktemp("model"))
        world.run(1, make_model, directory, kind)
        return directory

    return saved


def expect_few_waits(answer: dict[str, Any], layout: dict[str, int]) -> None:
    """Scoring asks for no value, a training step for a few, once a global batch."""
    scoring, training = dict(answer["scoring"]), dict(answer["waits"])
    assert scoring == {}
    assert training == {NORM: 1, COUNT: layout.get("virtual_pipeline", 1), METRICS: answer["metrics"]}
