"""Measures the log-prob step against cross-entropy of full logits, forward and backward, on this machine's CPU in float32.

    python tools/bench_logprob.py

8,192 rows, a vocabulary of 128,256, hidden size 512 (a model's own 4,096 would take minutes a pass on two cores and leave less to
the row work, which is where the two differ). Each pass is a process of its own, which first makes weights, hidden states and the
weights' gradient; sides take turns, so that a machine that others use slows none of them alone, and each one's best pass counts.
Prints one JSON line:

    full, chunked    seconds, and bytes of memory at the peak beyond what stood before the pass
    masked           the same of the chunked path with 40% of the labels left out
    time, memory     chunked over full; time_masked: masked over full
    agree            largest difference of log-probabilities, and of the weights' gradient relative to its largest entry

Needs some 14 GB of memory for the full logits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tulu_kernels.linear_logprob import WORKSPACE, linear_logprob

from tulu_mega.platforms.cpu_speed.matmul import bound_caches, times_transposed

KEPT = 512
"""rows and columns of the results that are compared"""


class Peak:
    """The most memory of this process, looked at every few milliseconds, beyond what it had at the start."""

    def __enter__(self) -> Peak:
        self._start = self._most = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, _resident())

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        self.bytes = self._most - self._start


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def one_pass(side: str, rows: int, vocabulary: int, hidden_size: int, workspace: int, results: Path) -> dict[str, float]:
    """Seconds and bytes of a pass; the log-probabilities and a corner of the weights' gradient go to `results`."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, hidden_size, generator=generator)
    weight = (torch.randn(vocabulary, hidden_size, generator=generator) / hidden_size**0.5).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    trained = torch.rand(rows, generator=generator) >= (0.4 if side == "masked" else 0.0)
    buffer = torch.empty_like(weight, requires_grad=False).zero_()  # touched, as megatron-core's gradient buffer is
    leaf = hidden.clone().requires_grad_()
    at = trained.nonzero().squeeze(1)
    with Peak() as peak:
        begin = time.perf_counter()
        if side == "full":
            logp = -F.cross_entropy(leaf @ weight.t(), labels, reduction="none")
        else:
            logp, _none = linear_logprob(
                leaf[at], weight, labels[at], columns=vocabulary, workspace=workspace,
                product=times_transposed, gradient_buffer=lambda _weight: buffer,
            )  # fmt: skip
        logp.sum().backward()
        if side == "full":
            buffer.add_(weight.grad)
        seconds = time.perf_counter() - begin
    torch.save({"logp": logp.detach(), "weight": buffer[:KEPT, :KEPT].clone()}, results)
    return {"seconds": round(seconds, 2), "bytes": peak.bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--workspace", type=int, default=WORKSPACE, help="bytes of logits made at a time")
    parser.add_argument("--side", choices=["full", "chunked", "masked"], help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    bound_caches()
    shape = (options.rows, options.vocabulary, options.hidden)
    if options.side:
        print(json.dumps(one_pass(options.side, *shape, options.workspace, options.results)))
        return
    report: dict[str, object] = dict(zip(("rows", "vocabulary", "hidden"), shape, strict=True))
    report |= {"workspace": options.workspace, "threads": torch.get_num_threads()}
    sides: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in ("full", "chunked", "masked") * options.passes:
            of_side = ["--side", side, "--results", f"{folder}/{side}.pt"]
            command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], *of_side]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            once = json.loads(out.splitlines()[-1])
            best = sides.setdefault(side, once)
            sides[side] = {"seconds": min(best["seconds"], once["seconds"]), "bytes": max(best["bytes"], once["bytes"])}
        full, chunked = (torch.load(f"{folder}/{side}.pt", weights_only=True) for side in ("full", "chunked"))
    report |= sides
    report["time"] = round(sides["chunked"]["seconds"] / sides["full"]["seconds"], 3)
    report["time_masked"] = round(sides["masked"]["seconds"] / sides["full"]["seconds"], 3)
    report["memory"] = round(sides["chunked"]["bytes"] / sides["full"]["bytes"], 4)
    report["agree"] = {
        "logp": float((full["logp"] - chunked["logp"]).abs().max()),
        "weight": float((full["weight"] - chunked["weight"]).abs().max() / full["weight"].abs().max()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
