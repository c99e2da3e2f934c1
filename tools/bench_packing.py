"""Measures the packer: how long a step of its packs takes by simulation, and how fast it plans.

    python tools/bench_packing.py

A million sequence lengths, distributed like Tulu 3's, are planned in batches of 128 for an 8B model under two layouts, each on
one core. Prints one JSON line with, for each layout:

    seconds            to plan everything
    ratio              makespan of a step over that of as many equally filled micro-batches: mean, 99th percentile and maximum
    steps_above_1.05   of all steps; a sequence of twice the mean micro-batch alone can do that
    busy               mean share of the ranks' time that is work
    micro_batches      on a data-parallel rank, mean
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

import numpy as np

from tulu_mega.data.packing import plan_step
from tulu_mega.layout.alignment import Alignment
from tulu_mega.layout.cost import sequence_flops
from tulu_mega.layout.schedule import Pipeline, simulate

BATCH, CAPACITY = 128, 4096
CASES = {"DP8": (8, Pipeline()), "PP4xVPP2xDP2": (2, Pipeline(4, 2))}
COST = sequence_flops(hidden=4096, ffn=14336, layers=32, vocabulary=128256, kv_width=1024)
_QUANTILES = {0: 20, 0.05: 80, 0.25: 220, 0.5: 400, 0.75: 600, 0.9: 1080, 0.95: 1800, 0.99: 3100, 1: 4096}


@dataclass(frozen=True)
class Comparison:
    """Steps of one layout."""

    ratios: list[float]
    """simulated makespan over that of as many equal micro-batches, by step"""
    busy: list[float]
    micro_batches: list[int]
    seconds: float
    """planning alone"""


def tulu_lengths(count: int, seed: int) -> np.ndarray:
    """Lengths with a long tail: median 400, mean 550, 95th percentile 1,800, at most 4,096."""
    drawn = np.random.RandomState(seed).random_sample(count)
    return np.exp(np.interp(drawn, list(_QUANTILES), np.log(list(_QUANTILES.values())))).astype(int)


def compare(case: str, lengths: np.ndarray) -> Comparison:
    """Plans all batches, then simulates them."""
    ranks, pipeline = CASES[case]
    batches = [lengths[start : start + BATCH].tolist() for start in range(0, len(lengths), BATCH)]
    begin = time.perf_counter()
    plans = [
        plan_step(batch, ranks, CAPACITY, Alignment(), cost=COST, multiple=pipeline.multiple, pipeline=pipeline)
        for batch in batches
    ]
    seconds = time.perf_counter() - begin
    ratios, busy = [], []
    for batch, plan in zip(batches, plans, strict=True):
        costs_RM = [[sum(COST(batch[index]) for index in members) for members in rank] for rank in plan]
        count = len(plan[0])
        simulation = simulate(costs_RM, pipeline)
        equal = pipeline.makespan([sum(map(sum, costs_RM)) / (ranks * count)] * count)
        ratios.append(simulation.makespan / equal)
        busy.append(simulation.busy)
    return Comparison(ratios, busy, [len(plan[0]) for plan in plans], seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, default=1_000_000)
    options = parser.parse_args()
    lengths = tulu_lengths(options.lengths, seed=0)
    report: dict[str, object] = {
        "lengths": len(lengths),
        "median": float(np.median(lengths)),
        "mean": round(float(lengths.mean()), 1),
        "p95": float(np.percentile(lengths, 95)),
    }
    for case in CASES:
        result = compare(case, lengths)
        ratios = np.array(result.ratios)
        report[case] = {
            "seconds": round(result.seconds, 2),
            "ratio": {
                "mean": round(float(ratios.mean()), 4),
                "p99": round(float(np.percentile(ratios, 99)), 4),
                "max": round(float(ratios.max()), 4),
            },
            "steps": len(ratios),
            "steps_above_1.05": int((ratios > 1.05).sum()),
            "busy": round(float(np.mean(result.busy)), 4),
            "micro_batches": round(float(np.mean(result.micro_batches)), 2),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
