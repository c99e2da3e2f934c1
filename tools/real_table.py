"""What `tools/real.py` found, as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from real_stages import Sizes

STAGES = {"before": "SmolLM2-135M-Instruct", "sft": "after SFT", "dpo": "after DPO-norm", "grpo": "after GRPO"}
NO_FIGURES = "Made with --small: a look at whether it runs; its figures say nothing.\n\n"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def first_and_last(run: Path, name: str) -> tuple[float, float]:
    """A held-out figure before the first step and after the last."""
    values = [row[name] for row in metrics(run) if name in row]
    return values[0], values[-1]


def gain(run: Path) -> float:
    """Share of held-out constraints met more at the end of a run than at its beginning."""
    first, last = first_and_last(run, "heldout_solve_rate")
    return last - first


def recipe(directory: Path, sizes: Sizes, small: bool) -> str:
    """The recipe's table; all figures go to results.json."""
    results = {name: json.loads((directory / "eval" / name / "results.json").read_text(encoding="utf-8")) for name in STAGES}
    score = json.loads((directory / "score.json").read_text(encoding="utf-8"))
    seconds = json.loads((directory / "seconds.json").read_text(encoding="utf-8"))
    stages = {
        "held-out loss, SFT": first_and_last(directory / "sft", "heldout_loss"),
        "pairs told apart, reward model": first_and_last(directory / "rm", "heldout_accuracy"),
        "pairs told apart, DPO-norm": first_and_last(directory / "dpo", "heldout_accuracy"),
        "held-out constraints met, GRPO": first_and_last(directory / "grpo", "heldout_solve_rate"),
    }
    known = {
        "tasks": {name: result["tasks"] for name, result in results.items()},
        "stages": stages,
        "score": score,
        "seconds": seconds,
    }
    (directory / "results.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    tasks = list(results["before"]["tasks"])
    titles = [
        f"{results['before']['tasks'][task]['title']} ({next(iter(results['before']['tasks'][task]['metrics']))})"
        for task in tasks
    ]
    lines = [
        f"| {sizes.limit} rows a task | {' | '.join(titles)} |",
        f"| --- |{' --- |' * len(titles)}",
        *(
            f"| {STAGES[name]} | {' | '.join(_cell(result['tasks'][task]) for task in tasks)} |"
            for name, result in results.items()
        ),
        "",
        "| held out | before | after |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {'all alike' if name.endswith('DPO-norm') else f'{first:.3f}'} | {last:.3f} |"
            for name, (first, last) in stages.items()
        ),
        "",
        f"Log-probabilities of {score['tokens']:,} tokens are within {score['largest']:.1e} of transformers', of the same file.",
        f"GRPO's checkpoint, converted back, is what the run exported. {sum(seconds.values()) / 60:.0f} minutes: "
        + ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
        + ".",
    ]
    return (NO_FIGURES if small else "") + "\n".join(lines) + "\n"


def _cell(task: dict[str, Any]) -> str:
    first = next(iter(task["metrics"].values()))
    return f"{first['value']:.1%} ({first['low']:.1%} to {first['high']:.1%})"


def comparison(directory: Path, seeds: int, small: bool) -> str:
    """Held-out constraints met before and after, of the seeds that are done, each beside its control."""
    lines = ["| seed | rewards | before | after | gain |", "| --- | --- | --- | --- | --- |"]
    gains: dict[str, list[float]] = {"": [], "_shuffled": []}
    for number in range(seeds):
        for suffix, rewards in (("", "of the verifier"), ("_shuffled", "shuffled")):
            run = directory / f"grpo_seed{number}{suffix}"
            if not (run / "hf").exists():
                continue
            first, last = first_and_last(run, "heldout_solve_rate")
            gains[suffix].append(last - first)
            lines.append(f"| {number} | {rewards} | {first:.1%} | {last:.1%} | {last - first:+.1%} |")
    for suffix, what in (("", "of the verifier"), ("_shuffled", "shuffled")):
        if len(several := gains[suffix]) > 1:
            lines.append(f"| mean of {len(several)} | {what} | | | {sum(several) / len(several):+.1%} |")
    return (NO_FIGURES if small else "") + "\n".join(lines) + "\n"
