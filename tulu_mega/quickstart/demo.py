"""The quickstart's story: make a task and a model, ask it, run the recipe's stages with the real commands, ask again, compare."""

from __future__ import annotations

import json
import time
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega.config import ModelSettings
from tulu_mega.evaluation.settings import EvalSettings, TaskSettings
from tulu_mega.quickstart import running, task, tiny_model
from tulu_mega.quickstart.stages import stage_settings

if TYPE_CHECKING:
    from rich.console import Console

    from tulu_mega.quickstart.settings import QuickstartSettings

HELDOUT_PROBLEMS = 500
HELDOUT_TWO_STEP = 0.8
"""Harder than the demonstrations, so that there is something left to learn after them."""
DEMONSTRATIONS = 17_920
PAIRS = 5_760
HELDOUT_PAIRS = 500
PROMPTS = 8_000
MAX_TOKENS = 48
"""Room for an answer: worked ones take some 25 tokens."""
SAMPLES = 3


def run(settings: QuickstartSettings) -> None:
    """Makes, asks, trains, asks again and prints what came of it. What is complete in `run_dir` is not done again.

    Args:
        settings: `run_dir`, `seed` and the stages' steps.

    Raises:
        UserError: the directory holds a quickstart with other settings, vLLM is missing, or the training failed.
    """
    from rich.console import Console

    from tulu_mega.inference.offline import check_vllm

    check_vllm()
    console = Console()
    started = time.monotonic()
    directory = Path(settings.run_dir)
    made_with = settings.model_dump(exclude={"run_dir"})
    running.claim(directory / "quickstart.json", made_with)
    heldout, model = directory / "data/heldout.jsonl", directory / "model"

    console.rule("1. a task and a model, made here")
    make_data(directory / "data", settings.seed)
    running.once(model, lambda: _make_model(model, settings.seed))
    console.print(
        f"{DEMONSTRATIONS:,} demonstrations, {PAIRS:,} pairs of a right and a wrong answer for each of two stages, {PROMPTS:,} "
        f"problems to practise on, {HELDOUT_PROBLEMS} held-out problems and {HELDOUT_PAIRS} held-out pairs: {directory}/data; "
        f"model: {model}"
    )

    console.rule("2. vLLM answers the held-out problems, before")
    answered = {"before": evaluated(model, heldout, directory / "before")}

    console.rule("3. tulu-mega sft: 2 processes, Megatron tensor and sequence parallel")
    _stage("sft", directory, made_with)
    answered["after SFT"] = evaluated(directory / "sft/hf", heldout, directory / "sft/eval")

    console.rule("4. tulu-mega rm: a reward model from the SFT model, 2 processes, data parallel")
    _stage("rm", directory, made_with)

    console.rule("5. tulu-mega dpo: length-normalised DPO of the SFT model, 2 processes, data parallel")
    _stage("dpo", directory, made_with)
    answered["after DPO-norm"] = evaluated(directory / "dpo/hf", heldout, directory / "dpo/eval")

    console.rule("6. tulu-mega grpo: reinforcement learning of the DPO model, 2 processes and a live vLLM server")
    _stage("grpo", directory, made_with)
    answered["after GRPO"] = evaluated(directory / "grpo/hf", heldout, directory / "grpo/eval")

    console.rule("what came of it")
    _show(console, directory, answered)
    console.print(_next_steps(directory, time.monotonic() - started), highlight=False, soft_wrap=True)


def make_data(directory: Path, seed: int) -> None:
    """Writes demonstrations, questions and pairs to train on and to be held out, where they are not there yet."""
    train, heldout = directory / "train.jsonl", directory / "heldout.jsonl"
    running.once(train, lambda: task.write_jsonl(islice(task.demonstrations(seed), DEMONSTRATIONS), train))
    problems = islice(task.problems("heldout", seed, HELDOUT_TWO_STEP), HELDOUT_PROBLEMS)
    running.once(heldout, lambda: task.write_jsonl(map(task.prompt_row, problems), heldout))
    practice = directory / "prompts.jsonl"
    asked = islice(task.problems("train", f"{seed} practice", HELDOUT_TWO_STEP), PROMPTS)
    running.once(practice, lambda: task.write_jsonl(map(task.prompt_row, asked), practice))
    sides: tuple[tuple[task.Split, str, int], ...] = (("train", "", PAIRS), ("heldout", "heldout_", HELDOUT_PAIRS))
    for (split, side, count), (kind, slips) in product(sides, (("pairs", task.SLIPS), ("rm_pairs", task.COARSE_SLIPS))):
        file, rows = directory / f"{side}{kind}.jsonl", islice(task.pairs(split, seed, slips=slips), count)
        running.once(file, partial(task.write_jsonl, rows, file))


def evaluated(model: Path, questions: Path, output: Path) -> dict[str, Any]:
    """Return the score of `tulu-mega eval`, with its interval. Problems that `output` has answers to are not asked again."""
    from tulu_mega.evaluation.run import evaluate

    results = evaluate(
        EvalSettings(
            model=ModelSettings(path=str(model), dtype="fp32"),
            output=str(output),
            tasks={"rlvr": TaskSettings(data=str(questions), max_tokens=MAX_TOKENS)},
        )
    )
    return results["tasks"]["rlvr"]


def _make_model(model: Path, seed: int) -> None:
    temporary = model.with_name(f".{model.name}")
    tiny_model.make(temporary, seed)
    temporary.replace(model)


def _stage(command: str, directory: Path, made_with: dict[str, int]) -> None:
    running.stage(command, directory, stage_settings(command, directory.as_posix(), **made_with))


def heldout_accuracy(run: Path) -> float:
    """Return the share of held-out pairs whose chosen side has the higher reward at the end of a stage."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return next(row["heldout_accuracy"] for row in map(json.loads, reversed(lines)) if "heldout_accuracy" in row)


def _show(console: Console, directory: Path, answered: dict[str, dict[str, Any]]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from tulu_mega.data.tools.tables import print_table

    headings = ("model", "problems solved", "accuracy", "95% interval", "pairs told apart")
    table = Table(*headings, title="Held out, greedy answers", box=box.SIMPLE_HEAD, pad_edge=False)
    pairs = {"after DPO-norm": heldout_accuracy(directory / "dpo")}
    for name, result in answered.items():
        score, total = result["metrics"]["score"], result["problems"]
        interval = f"{score['low']:.1%} to {score['high']:.1%}"
        told = f"{pairs[name]:.1%}" if name in pairs else ""
        table.add_row(name, f"{round(score['value'] * total)} of {total}", f"{score['value']:.1%}", interval, told)
        if name == "after SFT":
            table.add_row("reward model", "", "", "", f"{heldout_accuracy(directory / 'rm'):.1%}")
    print_table(table, console)
    outputs = dict(zip(answered, ("before", "sft/eval", "dpo/eval", "grpo/eval"), strict=True))
    samples = Table("question", "expected", *answered, title="Answers", show_lines=True)
    for records in islice(zip(*(_samples(directory / output) for output in outputs.values()), strict=True), SAMPLES):
        said = (_visible(record["responses"][0]["response"]) for record in records)
        samples.add_row(*map(escape, (records[0]["messages"][-1]["content"], records[0]["answer"], *said)))
    console.print(samples)


def _samples(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples/rlvr.jsonl").read_text(encoding="utf-8").splitlines()]


def _visible(text: str) -> str:
    """Return text without characters that a terminal obeys: an untrained model writes bytes of all kinds."""
    shown = "".join(char if char.isprintable() else "·" for char in text)
    return shown if len(shown) <= 60 else shown[:59] + "…"


def _next_steps(directory: Path, seconds: float) -> str:
    return f"""\
{seconds:.0f} s. In {directory}: data/ model/ before/, the stages sft/ rm/ dpo/ grpo/ (metrics.jsonl checkpoints/ hf/ eval/ logs/)
Try next
  to ask it yourself:
    tulu-mega generate --model.path {directory}/grpo/hf --model.dtype fp32
  to see how the training went and what was said, in {directory}/grpo/report.html:
    tulu-mega report {directory}/grpo
  to see another loss of the same pairs:
    tulu-mega dpo {directory}/dpo.toml --run_dir {directory}/simpo --preference.loss simpo --preference.beta 2
  to train low-rank adapters (LoRA) in place of all weights, and ask the model with them:
    tulu-mega dpo {directory}/dpo.toml --run_dir {directory}/lora --lora.rank 16 --optim.lr 2e-3
    tulu-mega generate --model.path {directory}/sft/hf --model.dtype fp32 --adapter {directory}/lora/adapter
  to train the same on one process, to the same losses:
    tulu-mega sft {directory}/sft.toml --run_dir {directory}/sft-tp1 --parallel.tensor 1
  to see every setting:
    tulu-mega sft --help"""
