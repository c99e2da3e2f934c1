"""What `make gpu` runs on a CUDA device, run on a CPU: a mistake in it would else be found in a device's time."""

from __future__ import annotations

import json
import os
import signal
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
        ("--set", "megatron.gradient_accumulation_fusion=false", "megatron.bias_activation_fusion=false"),
    ],
    ids=["profile", "unfused"],
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
    assert found["correct"]["ok"] and found["failed"] == []


KERNELS = [sys.executable, "-u", str(ROOT / "tools/bench_kernels.py"), "--device", "cpu"]
INTERPRETED = os.environ | {"TRITON_INTERPRET": "1"}


def test_a_part_that_fails_stops_no_other():
    words = [*KERNELS, "--only", "logprob", "buckets", "--rows", "-1", "96"]
    done = subprocess.run(words, env=INTERPRETED, capture_output=True, text=True, timeout=550)
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and found["failed"] == ["logprob -1"] and "Traceback" in done.stderr
    assert "negative" in found["logprob"]["-1"]["failed"]
    assert found["logprob"]["96"]["ours"]["milliseconds"] > 0 and found["buckets"]["triton"] > 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_what_was_measured_before_a_time_out_is_told(how):
    words = [*KERNELS, "--only", "buckets", "logprob"]
    with subprocess.Popen(words, env=INTERPRETED, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("== logprob"):
                process.send_signal(how)
    found = json.loads(lines[-1])
    assert process.returncode != 0 and found["buckets"]["triton"] > 0 and "tflops" not in found["logprob"]["96"]


def gpu(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # one that runs us shows in ours
    return subprocess.run(command, cwd=ROOT, env=outside | environment, capture_output=True, text=True)


def test_an_unknown_part_is_refused():
    done = gpu("tools/gpu.sh", "tests", "kernel", PYTHON=sys.executable)
    assert done.returncode == 2 and "part kernel: expected some of smoke training unfused tests ipc kernels" in done.stderr


@pytest.mark.alone
@pytest.mark.parametrize("command", [["tools/gpu.sh", "--device", "cpu"], ["make", "gpu", "GPU_PARTS=--device cpu"]])
def test_all_parts_run_within_their_limits(tmp_path, command):
    """Each with its log and its figures; the summary is the last line and a file."""
    done = gpu(*command, PYTHON=sys.executable, LOGS=f"{tmp_path}/logs")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and summary["ok"], done.stdout[-4000:]
    assert summary == json.loads((tmp_path / "logs/summary.json").read_text())
    assert list(summary["parts"]) == ["smoke", "training", "unfused", "tests", "ipc", "kernels"]
    assert {each.name for each in (tmp_path / "logs").iterdir()} == {f"{name}.log" for name in summary["parts"]} | {
        "summary.json"
    }
    assert summary["parts"]["ipc"]["result"]["equal"] == summary["parts"]["ipc"]["result"]["rounds"]
    assert len(json.dumps(summary)) < 12_000


@pytest.mark.alone
def test_a_part_that_does_not_fit_is_skipped_and_said(tmp_path):
    done = gpu("tools/gpu.sh", "smoke", "ipc", "--device", "cpu", "--total", "45", PYTHON=sys.executable, LOGS=str(tmp_path))
    summary = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and "== smoke: skipped" in done.stdout
    assert {name: part["ended"] for name, part in summary["parts"].items()} == {"smoke": "skipped", "ipc": "ok"}


LEAVING = """
import subprocess
subprocess.Popen(["sleep", "90"])                          # one in the part's group, one that has left it
away = subprocess.Popen(["sleep", "90"], start_new_session=True)
print('{"e": 5}', flush=True)
"""
"""A part that leaves processes behind which hold its output."""


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import gpu as program

    parts = {
        "failing": program.Part(120, ("-c", "print('{\"a\": 1}'); raise SystemExit(3)"), ()),
        "hanging": program.Part(10, ("-c", "import time; print('{\"b\": 2}', flush=True); time.sleep(600)"), ()),
        "leaving": program.Part(120, ("-c", LEAVING), ()),
        "well": program.Part(120, ("-c", "print('{\"c\": \"' + 'x' * 4000 + '\", \"d\": 4}')"), ()),
    }
    monkeypatch.setattr(program, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--logs", str(tmp_path)])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert program.main() == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    found = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert found["failing"]["ended"] == "failed" and found["failing"]["result"] == {"a": 1}
    assert found["hanging"]["ended"] == "timed out" and found["hanging"]["result"] == {"b": 2}
    assert found["leaving"]["ended"] == "ok" and found["leaving"]["seconds"] < 60 and found["leaving"]["result"] == {"e": 5}
    assert found["well"]["ended"] == "ok" and found["well"]["result"] == {"d": 4} and found["well"]["in_the_log"] == ["c"]


SLOW = """
import sys
sys.path.insert(0, "tools")
import gpu
gpu.PARTS = {"first": gpu.Part(60, ("-c", "print('{\\"a\\": 1}')"), ()),
             "second": gpu.Part(60, ("-c", "import time; print('{\\"b\\": 2}', flush=True); time.sleep(50)"), ()),
             "third": gpu.Part(60, ("-c", ""), ())}
sys.exit(gpu.main())
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_call_that_is_cut_off_leaves_what_came_before(tmp_path, how):
    words = [sys.executable, "-c", SLOW, "--logs", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith('{"b"'):
                break
        process.send_signal(how)
        rest = process.stdout.read() if how == signal.SIGTERM else ""
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["parts"]["first"]["result"] == {"a": 1} and "third" not in told["parts"] and not told["ok"]
    if how == signal.SIGTERM:
        assert process.returncode == 143 and json.loads(rest.splitlines()[-1]) == told
        assert told["parts"]["second"] | {"seconds": 0} == {"ended": "interrupted", "seconds": 0, "result": {"b": 2}}


def test_a_full_disk_stops_no_part(tmp_path):
    (tmp_path / "first.log").symlink_to("/dev/full")
    (tmp_path / "summary.json").symlink_to("/dev/full")
    done = gpu(sys.executable, "-c", SLOW.replace("time.sleep(50)", ""), "--logs", str(tmp_path))
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["ok"]
    assert "first.log: No space left on device; the rest is only printed" in done.stderr
