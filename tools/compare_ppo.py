"""PPO beside GRPO on the quickstart's task, in pairs of one seed, with PPO's controls.

    tulu-mega quickstart
    python tools/compare_ppo.py --seeds 0,1,2           runs what is not there yet, and prints the table
    python tools/compare_ppo.py --seeds 0,1,2 --told    the table of what is there
    python tools/compare_ppo.py --steps 20              shorter runs, which go on where a later call asks for more steps

Each run is `tulu-mega ppo examples/ppo_tiny.toml` or `tulu-mega grpo examples/grpo_tiny.toml` under another seed, in
RUNS/KIND_SEED. One that was interrupted goes on, one that has ended is not started again. What is not an option here goes to
the runs.

Controls: rewards that are dealt out at random among the responses, from which nothing can be learned; a value model that does
not learn.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tulu_mega.rl.journal import evaluation_file

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "grpo": ("grpo", []),
    "ppo": ("ppo", []),
    "ppo, rewards shuffled": ("ppo", ["--rewards.shuffle", "true"]),
    "ppo, value model frozen": ("ppo", ["--value.lr", "0"]),
}
SOLVED = "heldout_solve_rate"


@dataclass(frozen=True)
class Curve:
    """What a run's metrics say."""

    solved: tuple[tuple[int, float], ...]
    """tokens sampled before an evaluation, and the share of the held-out problems that were solved then"""
    explained: tuple[float, ...]
    """explained variance of every step; none of a run without a value model"""

    def at(self, tokens: int) -> float:
        """The share when so many tokens were sampled, between two evaluations on the line that joins them."""
        before, after = self.solved[0], self.solved[-1]
        for each in self.solved:
            before = each if each[0] <= tokens else before
        for each in reversed(self.solved):
            after = each if each[0] >= tokens else after
        part = (tokens - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
        return before[1] + min(max(part, 0.0), 1.0) * (after[1] - before[1])


def curve(lines: Sequence[dict], before: Sequence[dict]) -> Curve:
    """Of a run.

    Args:
        lines: of metrics.jsonl.
        before: answers of the evaluation before the first step.
    """
    judged = [one["score"] for one in before if one["score"] is not None]
    tokens, explained = 0, []
    solved = [(0, sum(score >= 1 for score in judged) / max(len(judged), 1))]
    for line in lines:
        tokens += line.get("generated_tokens", 0)
        if SOLVED in line:
            solved.append((tokens, line[SOLVED]))
        if "explained_variance" in line:
            explained.append(line["explained_variance"])
    return Curve(tuple(solved), tuple(explained))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences and its standard error, which one pair has not: NaN."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return statistics.mean(differences), error


def directory(runs: Path, kind: str, seed: int) -> Path:
    """Of a run."""
    return runs / f"{kind.replace(', ', '_').replace(' ', '_')}_{seed}"


def ended(place: Path, steps: int | None) -> bool:
    """Whether a run has ended, with as many steps as are asked for.

    Args:
        steps: as many as the run's file says when None.
    """
    return (place / "hf").is_dir() and (steps is None or len(_lines(place / "metrics.jsonl")) >= steps)


def run(runs: Path, kind: str, seed: int, steps: int | None, extra: Sequence[str]) -> None:
    """Starts a run, or goes on with it, unless it has ended."""
    place = directory(runs, kind, seed)
    if ended(place, steps):
        return
    stage, flags = KINDS[kind]
    if steps:
        flags = [*flags, "--train.steps", str(steps)]
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tulu_mega", stage, str(ROOT / f"examples/{stage}_tiny.toml"), "--run_dir", str(place)]
    with (place.parent / f"{place.name}.log").open("ab") as log:
        subprocess.run([*command, "--seed", str(seed), *flags, *extra], stdout=log, stderr=log, check=True)


def read(place: Path) -> Curve | None:
    """Of a run that has ended; None of another."""
    if not (place / "hf").is_dir():
        return None
    return curve(_lines(place / "metrics.jsonl"), _lines(evaluation_file(place, 0)))


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table(found: dict[str, dict[int, Curve]]) -> str:
    """Rows of kinds, each seed's figures at the tokens that the shorter of the pair sampled."""
    lines = ["| run | seeds | solved before | solved, at equal tokens | explained variance, first and last fifth |"]
    lines.append("| --- | --- | --- | --- | --- |")
    grpo = found.get("grpo", {})
    gained = []
    for kind, curves in found.items():
        gains = []
        for seed, each in sorted(curves.items()):
            most = min(one.solved[-1][0] for one in (each, grpo.get(seed, each)))
            gains.append(each.at(most) - each.solved[0][1])
            fifth = max(1, len(each.explained) // 5)
            ends = [statistics.mean(part) for part in (each.explained[:fifth], each.explained[-fifth:]) if part]
            told = ", ".join(f"{mean:.2f}" for mean in ends)
            lines.append(f"| {kind} | {seed} | {each.solved[0][1]:.1%} | {each.at(most):.1%} of {most:,} | {told} |")
        if gains:
            gained.append(f"{kind}, gain over the start: {_told(gains, [0.0] * len(gains))}")
    lines += ["", *gained]
    pairs = sorted(grpo.keys() & found.get("ppo", {}).keys())
    if pairs:
        both = [(found["ppo"][seed], grpo[seed]) for seed in pairs]
        ends = [[one.at(min(each.solved[-1][0] for each in pair)) for one in pair] for pair in both]
        lines.append(f"PPO less GRPO at equal tokens: {_told([ppo for ppo, _ in ends], [other for _, other in ends])}")
    return "\n".join(lines)


def _told(ours: Sequence[float], theirs: Sequence[float]) -> str:
    mean, error = paired(ours, theirs)
    return f"{mean:+.1%}, one seed" if len(ours) == 1 else f"{mean:+.1%}, standard error {error:.1%} of {len(ours)} seeds"


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/ppo_beside_grpo"))
    parser.add_argument("--seeds", default="0,1,2", type=lambda words: [int(word) for word in words.split(",")])
    parser.add_argument("--kinds", default=list(KINDS), type=lambda words: [word.strip() for word in words.split(";")])
    parser.add_argument("--steps", type=int, help="of each run; as many as its file says when not given")
    parser.add_argument("--told", action="store_true", help="run nothing")
    given, extra = parser.parse_known_args()
    for seed in [] if given.told else given.seeds:
        for kind in given.kinds:
            run(given.runs, kind, seed, given.steps, extra)
            print(f"{kind}, seed {seed}: done", flush=True)
    found = {kind: {seed: read(directory(given.runs, kind, seed)) for seed in given.seeds} for kind in given.kinds}
    print(table({kind: {seed: each for seed, each in curves.items() if each} for kind, curves in found.items()}))


if __name__ == "__main__":
    main()
