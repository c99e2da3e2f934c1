"""Trains and scores a small Llama through the real commands on one device and compares with transformers there.

    python3 tools/gpu_smoke.py                  on a CUDA device, with whatever torch this Python has
    python3 tools/gpu_smoke.py --device cpu     the same on a CPU

Nothing needs to be installed: the repository is put on the path. For each precision it makes a model and conversations, runs
`tulu-mega sft` and `tulu-mega score`, then computes the trained model's scores once more with transformers. fp32 must agree to
1e-4; bf16 may be no further from transformers' fp32 than its own bf16 is, with some room. Prints one JSON line, after a failure
or a time-out (an interrupt, or a signal to end) of what was done until then; exit status 1 when something is off.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREES = [str(ROOT), str(ROOT / "kernels")]
sys.path[:0] = TREES

ROWS, SCORED, SEED = 512, 64, 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtypes", default="fp32,bf16", help="comma-separated, of fp32 and bf16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--keep", help="directory to work in and leave; a temporary one when unset")
    arguments = parser.parse_args()

    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device; run this on a GPU machine or with --device cpu", file=sys.stderr)
        return 2
    report = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: told to end"))
    dtypes = arguments.dtypes.split(",")
    try:
        with tempfile.TemporaryDirectory(prefix="gpu_smoke_") as scratch:
            work = Path(arguments.keep or scratch)
            inputs = make_inputs(work)
            for dtype in dtypes:
                try:
                    report[dtype] = smoke(inputs, work / dtype, dtype, arguments.device, arguments.steps)
                except Exception as error:  # the other precision may be all right
                    traceback.print_exc()
                    report[dtype] = {"failed": f"{type(error).__name__}: {str(error)[:200]}", "ok": False}
    finally:
        report["ok"] = all(report.get(dtype, {}).get("ok", False) for dtype in dtypes)
        print(json.dumps(report), flush=True)
    return int(not report["ok"])


def make_inputs(work: Path) -> dict[str, Path]:
    """A model directory, conversations to train on, and others to score."""
    from tulu_mega.quickstart import task, tiny_model

    paths = {"model": work / "model", "train": work / "train.jsonl", "score": work / "score.jsonl"}
    work.mkdir(parents=True, exist_ok=True)
    tiny_model.make(paths["model"], SEED)
    task.write_jsonl(islice(task.demonstrations(SEED), ROWS), paths["train"])
    task.write_jsonl(islice(task.demonstrations(SEED + 1), SCORED), paths["score"])
    return paths


def smoke(inputs: dict[str, Path], work: Path, dtype: str, device: str, steps: int) -> dict:
    """Trains and scores in one precision; what came of it, with `ok`."""
    run_dir, scores = work / "run", work / "scores.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    sft = {
        "model": inputs["model"], "model.dtype": dtype, "run_dir": run_dir, "data.train": inputs["train"], "data.workers": 1,
        "data.max_length": 256, "data.pack_length": 2048, "train.steps": steps, "train.global_batch": 32, "optim.lr": 2e-3,
    }  # fmt: skip
    command("sft", sft, device)
    trained = time.perf_counter()
    score = {"model": run_dir / "hf", "model.dtype": dtype, "input": inputs["score"], "output": scores, "pack_length": 2048}
    command("score", score, device)
    scored = time.perf_counter()

    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    losses = [float(line["loss"]) for line in metrics]
    ours = [row["logprobs"] for row in rows]
    ids = [row["input_ids"] for row in rows]
    exact = transformers_logprobs(run_dir / "hf", ids, device, "fp32")
    difference = distance(ours, exact)
    result = {
        "steps": len(metrics),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "tokens_per_second": round(metrics[-1]["tokens_per_second"]),
        "seconds": {"sft": round(trained - start, 1), "score": round(scored - trained, 1)},
        "logprobs": sum(map(len, ours)),
        "from_fp32": difference,
    }
    agrees = difference["max"] < 1e-4
    if dtype == "bf16":
        result["transformers_from_fp32"] = theirs = distance(transformers_logprobs(run_dir / "hf", ids, device, dtype), exact)
        agrees = difference["mean"] <= 1.5 * theirs["mean"] + 1e-3
    result["ok"] = agrees and len(metrics) == steps and losses[-1] < losses[0] and len(rows) == SCORED
    return result


def command(name: str, flags: dict, device: str) -> None:
    """One `tulu-mega` command as users run it; its output goes to standard error, so that the report stands alone.

    Raises:
        RuntimeError: it failed.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*TREES, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    line = [sys.executable, "-m", "tulu_mega", name, *(f"--{flag}={value}" for flag, value in flags.items())]
    done = subprocess.run(line, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        raise RuntimeError(f"tulu-mega {name} ended with status {done.returncode}; its output is above")


def transformers_logprobs(model_dir: Path, ids: Sequence[list[int]], device: str, dtype: str) -> list[list[float]]:
    """Log-probability of every token but the first of each sequence, computed by transformers, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(model_dir).to(device, precision).eval()
    answers = []
    with torch.inference_mode():
        for sequence in ids:
            tokens = torch.tensor([sequence], device=device)
            logp = model(tokens).logits[0, :-1].float().log_softmax(-1)
            answers.append(logp.gather(-1, tokens[0, 1:, None])[:, 0].tolist())
    return answers


def distance(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> dict[str, float]:
    """Largest and mean absolute difference over all tokens.

    Raises:
        ValueError: when the two are not of the same lengths.
    """
    gaps = [abs(a - b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)]
    return {"max": max(gaps), "mean": sum(gaps) / len(gaps)}


if __name__ == "__main__":
    sys.exit(main())
