"""Decontamination of a million training rows against four evaluations of the usual sizes: seconds, rows a second, memory.

    python tools/bench_decontaminate.py [--rows 1000000] [--workers 2] [--keep DIR]

Rows are made: words drawn by Zipf's law from 50,000, prompts of 200 words on average (log-normal), 1 in 1,000 of them holding an
evaluation row. Prints one JSON line; fails when other rows than those are found.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from tulu_mega.config import DecontaminateSettings
from tulu_mega.data.tools.decontaminate import decontaminate
from tulu_mega.data.workers import cores

EVALUATIONS = {"gsm8k": (1319, 46), "math": (5000, 32), "ifeval": (541, 37), "mmlu": (14042, 60)}
"""rows and words of each"""
PLANTED = 1000
"""one row in so many holds an evaluation row"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--keep", help="directory for the made data; a temporary one when left out")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        directory = Path(options.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        train, evaluations = make(directory, options.rows)
        settings = DecontaminateSettings(
            train=str(train),
            evaluations={str(file): "question" for file in evaluations},
            output=str(directory / "out"),
            overlap=0.0,
            workers=options.workers,
        )
        load = os.getloadavg()[0]
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            decontaminate(settings)
        seconds = time.perf_counter() - begin
        (found,) = json.loads((directory / "out" / "report.json").read_text())["sets"]
        planted = len(range(0, options.rows, PLANTED))
        if found["contaminated"] != planted:
            raise SystemExit(f"{found['contaminated']} rows found, {planted} were planted")
        peak = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        line = {
            "bench": "decontaminate",
            "rows": options.rows,
            "mib": round(train.stat().st_size / 2**20),
            "evaluation_rows": sum(rows for rows, _ in EVALUATIONS.values()),
            "workers": options.workers,
            "seconds": round(seconds, 1),
            "rows_per_second": round(options.rows / seconds),
            "contaminated": found["contaminated"],
            "peak_gib": round(peak[0], 2),
            "peak_gib_worker": round(peak[1], 2),
            "load_before": round(load, 1),
        }
        print(json.dumps(line))


def make(directory: Path, rows: int) -> tuple[Path, list[Path]]:
    """The training file, and the evaluations' files."""
    random = np.random.RandomState(0)
    vocabulary = np.array([f"{'aeiou'[n % 5]}{n:x}" for n in range(50_000)], object)
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    cumulated = np.cumsum(weights / weights.sum())

    def text(length: int) -> str:
        return " ".join(vocabulary[np.searchsorted(cumulated, random.random_sample(length))])

    files, questions = [], []
    for name, (count, length) in EVALUATIONS.items():
        files.append(directory / f"{name}.jsonl")
        made = [text(length) for _ in range(count)]
        files[-1].write_text("".join(json.dumps({"question": question}) + "\n" for question in made))
        questions += made
    train = directory / "train.jsonl"
    lengths = np.clip(random.lognormal(4.8, 1.0, rows), 5, 4000).astype(int)
    with open(train, "w") as file:
        for row, length in enumerate(lengths.tolist()):
            prompt = text(length)
            if row % PLANTED == 0:
                prompt += f"\n{questions[random.randint(len(questions))].upper()}?\n" + text(20)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "It is so."}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return train, files


if __name__ == "__main__":
    main()
