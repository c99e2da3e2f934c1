"""Races length-normalised DPO against TRL's DPOTrainer, the reference precomputed on both sides, and against our own SFT.

    python tools/bench_dpo.py [--quick] [--hidden 512]

Needs `make peers`. As tools/bench_sft.py, whose model, lengths and rules these are: a pair's prompt is a third of its chosen
sequence, and the rejected response is as long as another text's. SFT is raced on the pairs' sides as texts of their own: as many
tokens, the same of them trained. Prints one JSON line:

    ours, peer, ratio   pairs/s, ours and TRL's at its best setting, and the first over the second
    lap_ratios          the same lap by lap, the same pairs in both: median, least, greatest
    step_over_sft       seconds of a DPO step over those of an SFT step of the same sequences, lap by lap: median, least, greatest
    memory_over_sft     peak memory beyond imports of the one over the other's, rank 0, in laps of their own with an
                        allocator that keeps nothing
    loss_gap            largest relative difference of a step's loss between the two in the first lap
    idle, load_average_before, busy_share_before, others_share
                        whether nothing else ran, before and during laps

`--search` tries the settings in question.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from bench_packing import tulu_lengths
from bench_sft import LAYERS, LONGEST, SHRINK, make_model
from race.racing import OURS, PEERS, SPARE, Entry, Racer, calm, lap_ratios, loss_gap, race, rates, wait_until_idle

BETA = 5.0


def ours(pack: int = 2 * LONGEST, tensor: int = 1, ranks: int = 1) -> Entry:
    return Entry("ours", OURS, "racer_dpo.py", {"pack": pack, "tensor": tensor}, ranks)


def sft(like: Entry, pairs: int) -> Entry:
    return Entry("sft", OURS, "racer_sft.py", like.setting | {"batch": 2 * pairs}, like.ranks)


def trl(micro: int, sort: bool = True, ranks: int = 1) -> Entry:
    return Entry("trl", PEERS, "peers/trl_dpo.py", {"micro": micro, "sort": sort}, ranks)


BEST = {128: (ours(), trl(4)), 512: (ours(), trl(1))}
SEARCH = [
    *(ours(pack, tensor, ranks) for tensor, ranks in ((1, 1), (1, 2), (2, 2)) for pack in (2 * LONGEST, 4 * LONGEST)),
    *(trl(micro, True, ranks) for ranks, micros in ((1, (1, 2, 4)), (2, (1, 2))) for micro in micros),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, choices=LAYERS, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=16, help="pairs in an optimizer step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lap", type=float, default=1.0, help="factor of a lap's length")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds to wait for an idle machine")
    parser.add_argument("--quick", action="store_true", help="two rounds of short laps: a look, no measurement")
    parser.add_argument("--search", nargs="?", const="", metavar="NAME", help="try the settings of both, or of one")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.lap, options.idle = 2, 0.5, 0.0
    report = {"bench": "dpo", **wait_until_idle(options.idle)}
    with tempfile.TemporaryDirectory(prefix="bench_dpo_") as scratch:
        spec = prepare(Path(scratch), options)
        pairs = spec["steps"] * options.batch
        amounts = [pairs] * (1 + options.rounds + SPARE)
        log = Path(scratch, "log.txt")
        if options.search is not None:
            for entry in (each for each in SEARCH if options.search in each.name):
                racer = race([entry], spec, options.rounds, log)[entry.name]
                found = {"pairs_per_second": rates(racer, amounts), **calm(racer)}
                print(json.dumps({"name": entry.name, "setting": entry.label, **found}), flush=True)
            return
        mine, peer = BEST[options.hidden]
        like = sft(mine, options.batch)
        racers = race([mine, peer, like], spec, options.rounds, log)
        lean = race([replace(mine, lean=True), replace(like, lean=True)], spec, 1, log)
    sides = {name: {"setting": racer.entry.label, **calm(racer)} for name, racer in racers.items()}
    for name in ("ours", "trl"):
        sides[name]["pairs_per_second"] = rates(racers[name], amounts)
    speeds = [sides[name]["pairs_per_second"][0] for name in ("ours", "trl")]
    report |= {
        "hidden": options.hidden,
        "vocab": options.vocab,
        "batch": options.batch,
        "ours": speeds[0],
        "peer": speeds[1],
        "ratio": round(speeds[0] / speeds[1], 3),
        "lap_ratios": lap_ratios(racers["ours"], racers["trl"]),
        "step_over_sft": lap_ratios(racers["sft"], racers["ours"]),
        "memory_over_sft": round(peak_bytes(lean["ours"]) / peak_bytes(lean["sft"]), 3),
        "loss_gap": loss_gap(racers["trl"], racers["ours"]),
        "sides": sides,
    }
    print(json.dumps(report))


def prepare(directory: Path, options: argparse.Namespace) -> dict:
    """Model, pairs, the same as texts, and both tokenised; what every racer is told of them."""
    from tulu_mega.config import DataSettings, ModelSettings, PreferenceDataSettings
    from tulu_mega.data.prepare import prepare as tokenised
    from tulu_mega.launch.run_dir import DATA

    steps = max(1, round({128: 6, 512: 1}[options.hidden] * options.lap))
    model, run, store = directory / "model", directory / "run", directory / "store"
    make_model(model, options.hidden, options.vocab)
    pairs, texts = directory / "pairs.jsonl", directory / "texts.jsonl"
    write_pairs(pairs, texts, (1 + options.rounds + SPARE) * steps * options.batch, options.vocab)
    settings = ModelSettings(path=str(model), dtype="fp32")
    tokenised(PreferenceDataSettings(train=str(pairs), max_length=LONGEST), settings, run / DATA, progress=False)
    tokenised(DataSettings(train=str(texts), max_length=LONGEST), settings, store, progress=False)
    return {
        "model": str(model), "pairs": str(pairs), "texts": str(texts), "run_dir": str(run), "store": str(store),
        "scratch": str(directory / "sft"), "batch": options.batch, "steps": steps, "longest": LONGEST, "lr": 1e-5, "beta": BETA,
    }  # fmt: skip


def write_pairs(pairs: Path, texts: Path, count: int, vocab: int) -> None:
    """Random tokens of Tulu-like lengths, ended by the tokenizer's eos."""
    random = np.random.RandomState(1)
    lengths = np.maximum(tulu_lengths(2 * count, seed=0) // SHRINK, 6).tolist()
    with pairs.open("w", encoding="utf-8") as out, texts.open("w", encoding="utf-8") as alone:
        for whole, other in zip(lengths[::2], lengths[1::2], strict=True):
            prompt = random.randint(3, vocab, whole // 3).tolist()
            responses = whole - len(prompt), min(other - other // 3, LONGEST - len(prompt))
            row = {}
            for side, length in zip(("chosen", "rejected"), responses, strict=True):
                response = [*random.randint(3, vocab, length - 1).tolist(), 1]
                text = {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
                row |= {f"{side}_{name}": value for name, value in text.items()}
                alone.write(json.dumps(text) + "\n")
            out.write(json.dumps(row) + "\n")


def peak_bytes(racer: Racer) -> int:
    """At the end of the race."""
    return max(lap["peak_bytes"] for lap in racer.laps)


if __name__ == "__main__":
    main()
