"""What needs a CUDA device, one part after another, in ten minutes: the parts that prove most come first.

    python3 tools/gpu.py                        all parts, 570 s at most
    python3 tools/gpu.py smoke ipc --logs out   some of them, in this order
    python3 tools/gpu.py --device cpu           small sizes on a CPU, to see that everything works

Each part has its limit and ten seconds more to end in; the next part runs even if one fails or leaves processes behind. A part
that no longer fits into the total is skipped and said. Everything is written under one folder (`--logs`): a log for each part,
and `summary.json`, which is also the last line printed: the machine, and of each part how it ended, its seconds, and the JSON
line that it ended with.

    smoke      `tulu-mega sft` and `score` in bf16 as users run them, beside transformers
    training   how fast Llama 3.1 8B's layers train as shipped, kernels by time
    unfused    the same without fused weight gradients and activation
    tests      the tests marked `gpu`
    ipc        weights from one process to another through CUDA IPC
    kernels    our kernels beside torch: results and time

Nothing has to be installed but megatron-core 0.16.1 and what setup.py lists.
`summary.json` is written after every part, so a call that is cut off leaves what came before. Exit status: 0 all passed, 1 a part
failed, timed out or was skipped, 2 a wrong name or a package that is missing, 130 or 143 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "blake3", "datasets", "httpx", "hypothesis", "megatron.core", "psutil", "pydantic", "pytest", "pytest_timeout", "rich",
    "transformers", "triton",
)  # fmt: skip
TO_END_S = 10
"""Seconds that a part gets to end in after its limit."""
LAST_WORDS_S = 5
"""Seconds that a part's output may still take once it has ended."""
LEAST = 0.5
"""Share of its limit that must be left for a part to be started."""
KEPT = 1500
"""Characters of a part's own figure that the summary keeps; its log has all."""


@dataclass(frozen=True)
class Part:
    """A program, and how long it may take."""

    limit_s: int
    on_gpu: Sequence[str]
    on_cpu: Sequence[str]


_TRAINING = ("tools/bench_training.py", "--steps", "3", "--profile")
_UNFUSED = ("--set", "megatron.gradient_accumulation_fusion=false", "megatron.bias_activation_fusion=false")
_SMALL = ("--device", "cpu", "--pack", "256")
_TESTS = ("-m", "pytest", "-v", "--durations", "5", "--session-timeout", "90", "-m", "gpu")
_TESTED = ("tests/gpu", "tests/kernels", "tests/resilience/test_stragglers.py")
PARTS = {
    "smoke": Part(75, ("tools/gpu_smoke.py", "--dtypes", "bf16"), ("tools/gpu_smoke.py", "--dtypes", "bf16", "--device", "cpu")),
    "training": Part(120, (*_TRAINING, "--pack", "8192"), (*_TRAINING, *_SMALL)),
    "unfused": Part(100, (*_TRAINING, "--pack", "8192", *_UNFUSED), (*_TRAINING, *_SMALL, *_UNFUSED)),
    "tests": Part(100, (*_TESTS, *_TESTED), (*_TESTS, *_TESTED)),
    "ipc": Part(30, ("tools/bench_ipc.py", "--device", "cuda"), ("tools/bench_ipc.py", "--device", "cpu")),
    "kernels": Part(
        90,
        ("tools/bench_kernels.py", "--only", "correct", "logprob", "fp8_products", "--rows", "8192"),
        ("tools/bench_kernels.py", "--device", "cpu", "--only", "correct", "logprob", "--rows", "96"),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {' '.join(PARTS)}, in the order to run; all without")
    parser.add_argument("--logs", type=Path, default=Path("gpu_logs"), help="folder of what is written (default: %(default)s)")
    parser.add_argument("--total", type=int, default=570, metavar="SECONDS", help="for all parts together (default: %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"part {' '.join(unknown)}: expected some of {' '.join(PARTS)}")
    missing = [name for name in NEEDED if not importable(name)]
    if missing:
        parser.error(f"{sys.executable} lacks {', '.join(missing)}; pip install them (megatron.core: megatron-core==0.16.1)")
    try:
        options.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--logs {options.logs}: {error.strerror}; choose a folder you may write")
    ends = time.monotonic() + options.total
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _frame: asked.append(got))
    summary: dict[str, Any] = {"bench": "gpu", "machine": machine(), "parts": {}, "ok": False}
    for name in options.parts or PARTS:
        summary["parts"][name] = run(name, options.device == "cuda", ends, options.logs, asked)
        if asked:
            summary["interrupted"] = True
            break
        tell(summary, options.logs)  # whoever is killed later has said this much
    summary["ok"] = not asked and all(part["ended"] == "ok" for part in summary["parts"].values())
    print(tell(summary, options.logs), flush=True)
    return 128 + asked[0] if asked else int(not summary["ok"])


def tell(summary: dict[str, Any], logs: Path) -> str:
    """Writes the summary, where that can be done; its text."""
    text = json.dumps(summary)
    with unstopped():
        (logs / "summary.json").write_text(text + "\n", encoding="utf-8")
    return text


@contextlib.contextmanager
def unstopped() -> Iterator[None]:
    """A full disk stops no measurement: what is printed is still told."""
    try:
        yield
    except OSError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)


def importable(name: str) -> bool:
    """Whether a package is there. It is not imported: that takes seconds of a device's time, and each part does it anyway."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def machine() -> dict[str, Any]:
    """What the figures were taken on: versions, and what nvidia-smi says."""
    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    for package in ("torch", "triton", "transformers", "megatron-core", "transformer-engine", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found["gpus"] = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[:-1]
    return found


def run(name: str, on_gpu: bool, ends: float, logs: Path, asked: list[int]) -> dict[str, Any]:
    """Runs a part within its limit; its output is printed and written to its log. What it leaves running is killed.

    Args:
        ends: `time.monotonic` by which all parts are to have ended.
        asked: gets a signal's number when this program is asked to end.

    Returns:
        How it `ended` ("ok", "failed", "timed out", "interrupted" or "skipped"), its `seconds`, and `result`, its last JSON line.
    """
    part = PARTS[name]
    limit = min(part.limit_s, int(ends - time.monotonic()) - TO_END_S)
    if limit < part.limit_s * LEAST:
        print(f"== {name}: skipped, {max(limit, 0)} s are left and it may take {part.limit_s}", flush=True)
        return {"ended": "skipped", "left_s": max(limit, 0)}
    print(f"== {name} (at most {limit} s)", flush=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not on_gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    began = time.monotonic()
    command = ["timeout", "-k", str(TO_END_S), str(limit), sys.executable, *(part.on_gpu if on_gpu else part.on_cpu)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    last: list[str] = []
    reader = threading.Thread(target=copy, args=(process.stdout, logs / f"{name}.log", last), daemon=True)
    reader.start()
    while process.poll() is None and not asked:
        time.sleep(0.05)
    if asked and process.poll() is None:
        process.send_signal(asked[0])  # `timeout` hands it on
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TO_END_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # the group that `timeout` has made
    status = process.wait()
    reader.join(LAST_WORDS_S)  # what has left the group may hold the pipe for as long as it lives
    ended = "timed out" if status in (124, 137) else "failed" if status else "ok"
    if asked:
        ended = "interrupted"
    return {"ended": ended, "seconds": round(time.monotonic() - began, 1)} | result(last[-1] if last else "")


def copy(output: IO[str], log: Path, last: list[str]) -> None:
    """Prints a part's output and writes it to its log, as far as that can be done.

    Args:
        last: gets the lines that may be JSON.
    """
    with contextlib.ExitStack() as stack:
        file = None
        with unstopped():
            file = stack.enter_context(log.open("w", encoding="utf-8"))
        for line in output:
            sys.stdout.write(line)
            sys.stdout.flush()
            if line.startswith("{"):
                last.append(line)
            if file:
                try:
                    file.write(line)
                    file.flush()
                except OSError as error:
                    print(f"error: {log}: {error.strerror}; the rest is only printed", file=sys.stderr, flush=True)
                    file = None


def result(line: str) -> dict[str, Any]:
    """A program's last JSON line as `result`, without its largest figures where it is long."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    left_out = []
    while len(json.dumps(found)) > KEPT:
        largest = max(found, key=lambda key: len(json.dumps(found[key])))
        left_out.append(largest)
        del found[largest]
    return {"result": found} | ({"in_the_log": left_out} if left_out else {})


if __name__ == "__main__":
    sys.exit(main())
