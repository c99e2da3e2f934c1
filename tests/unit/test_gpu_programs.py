"""What `make gpu` runs on a CUDA device, run on a CPU: a mistake in it would else be found in a device's time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(600)]


def told(program: str, *flags: str, **environment: str) -> dict[str, Any]:
    """The JSON line that a program ends with."""
    words = [sys.executable, str(ROOT / "tools" / program), "--device", "cpu", *flags]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "flags",
    [
        ("--pack", "256", "--profile"),
        ("--set", "megatron.gradient_accumulation_fusion=true", "megatron.bias_activation_fusion=true"),
    ],
    ids=["profile", "fused"],
)
def test_training_is_measured(flags):
    found = told("bench_training.py", "--steps", "2", *flags)
    assert found["layers"] == 2 and found["products"]["tflops"] > 0
    for pack in found["packs"].values():
        assert pack["of_products"] > 0 and pack["tokens_per_second"] > 0
    assert bool(found.get("kernels")) == ("--profile" in flags)


def test_smoke():
    assert told("gpu_smoke.py", "--dtypes", "fp32,bf16")["ok"]


def test_kernels_are_compared():
    found = told("bench_kernels.py", TRITON_INTERPRET="1")
    assert found["correct"]["ok"]
