"""A process that runs `steps`, asked case by case."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.fake_cuda import device


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
    line = [sys.executable, "-m", "tests.fake_cuda.steps", str(device.build(directory, compiler)), *options]
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
