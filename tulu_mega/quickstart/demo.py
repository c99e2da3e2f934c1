"""The quickstart's story: make a task and a model, ask it, fine-tune it with the real command, ask again, compare."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega.config import GenerateSettings, ModelSettings
from tulu_mega.errors import UserError
from tulu_mega.quickstart import task, tiny_model

if TYPE_CHECKING:
    from rich.console import Console

    from tulu_mega.quickstart.settings import QuickstartSettings

HELDOUT_PROBLEMS = 500
HELDOUT_TWO_STEP = 0.8
"""Harder than the demonstrations, so that there is something left to learn after them."""
DEMONSTRATIONS = 17_920
MAX_TOKENS = 48
"""Room for an answer: worked ones take some 25 tokens."""
SAMPLES = 3

SFT_TOML = """\
# Supervised fine-tuning of the quickstart's model: 2 processes, tensor and sequence parallel, on two CPU cores.
# `tulu-mega quickstart` makes the data and the model, and runs this.

run_dir = "{run_dir}/sft"
seed = {seed}

[model]
path = "{run_dir}/model"
dtype = "fp32"

[parallel]
tensor = 2
sequence = true

[data]
train = "{run_dir}/data/train.jsonl"
template = "tulu"
max_length = 512
pack_length = 4096                 # the whole batch in one packed micro-batch

[train]
steps = {steps}
global_batch = 64
reduction = "sum"                  # Tulu 3: the sum over tokens, divided by the number of sequences
log_every = 20

[optim]
lr = 3e-3                          # 600 times what 8B parameters take: a million bear it
schedule = "linear"
warmup = 0.03
betas = [0.9, 0.999]
weight_decay = 0.0
clip = 1.0
"""
"""What the quickstart trains with; `examples/sft_tiny.toml` is the same for the default directory, seed and steps."""


@dataclass(frozen=True)
class Score:
    """How many of the held-out problems were answered correctly."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        z, n, p = 1.96, self.total, self.accuracy
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


def run(settings: QuickstartSettings) -> None:
    """Makes, asks, trains, asks again and prints what came of it. What is complete in `run_dir` is not done again.

    Args:
        settings: `run_dir`, `seed` and `steps`.

    Raises:
        UserError: the directory holds a quickstart with other settings, vLLM is missing, or the training failed.
    """
    from rich.console import Console

    from tulu_mega.rollout.generate import check_vllm

    check_vllm()
    console = Console()
    started = time.monotonic()
    directory = Path(settings.run_dir)
    _claim(directory, seed=settings.seed, steps=settings.steps)
    heldout, model, trained = directory / "data/heldout.jsonl", directory / "model", directory / "sft/hf"

    console.rule("1. a task and a model, made here")
    make_data(directory / "data", settings.seed)
    _once(model, lambda: _make_model(model, settings.seed))
    console.print(f"{DEMONSTRATIONS:,} demonstrations and {HELDOUT_PROBLEMS} held-out problems: {directory}/data; model: {model}")

    console.rule("2. vLLM answers the held-out problems, before")
    before = answers(model, heldout, directory / "before.jsonl")

    console.rule("3. tulu-mega sft: 2 processes, Megatron tensor and sequence parallel")
    _once(trained, lambda: _train(directory, settings.seed, settings.steps))

    console.rule("4. vLLM answers the held-out problems, after")
    after = answers(trained, heldout, directory / "after.jsonl")

    console.rule("what came of it")
    _show(console, before, after)
    console.print(_next_steps(directory, time.monotonic() - started), highlight=False, soft_wrap=True)


def make_data(directory: Path, seed: int) -> None:
    """Writes `train.jsonl` (demonstrations) and `heldout.jsonl` (questions), where they are not there yet."""
    train, heldout = directory / "train.jsonl", directory / "heldout.jsonl"
    _once(train, lambda: task.write_jsonl(islice(task.demonstrations(seed), DEMONSTRATIONS), train))
    problems = islice(task.problems("heldout", seed, HELDOUT_TWO_STEP), HELDOUT_PROBLEMS)
    _once(heldout, lambda: task.write_jsonl(map(task.prompt_row, problems), heldout))


def answers(model: Path, questions: Path, output: Path) -> list[dict[str, Any]]:
    """The rows of `questions` with the model's greedy responses, as `tulu-mega generate` writes them to `output`."""
    from tulu_mega.rollout.generate import generate

    settings = GenerateSettings(
        model=ModelSettings(path=str(model), dtype="fp32"),
        input=str(questions),
        output=str(output),
        max_tokens=MAX_TOKENS,
    )
    _once(output, lambda: generate(settings))
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def score(rows: list[dict[str, Any]]) -> Score:
    """Judges rows with `response` and `ground_truth`."""
    return Score(sum(task.is_correct(row["response"], row["ground_truth"]) for row in rows), len(rows))


def sft_settings(run_dir: str, seed: int, steps: int) -> str:
    """The training settings of a quickstart in `run_dir`, as TOML."""
    return SFT_TOML.format(run_dir=run_dir, seed=seed, steps=steps)


def _claim(directory: Path, **settings: int) -> None:
    """Writes down what the directory is made with, so that no other seed's data and model are taken for this one's."""
    file = directory / "quickstart.json"
    if not file.exists():
        task.write_jsonl([settings], file)
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    if found != settings:
        raise UserError(f"{directory} holds a quickstart with {found}, not {settings}; give another --run_dir or remove it")


def _once(path: Path, make: Callable[[], None]) -> None:
    """Everything here appears when it is complete: what exists is whole."""
    if not path.exists():
        make()


def _make_model(model: Path, seed: int) -> None:
    temporary = model.with_name(f".{model.name}")
    tiny_model.make(temporary, seed)
    temporary.replace(model)


def _train(directory: Path, seed: int, steps: int) -> None:
    file = directory / "sft.toml"
    file.write_text(sft_settings(directory.as_posix(), seed, steps), encoding="utf-8")
    status = subprocess.run([sys.executable, "-m", "tulu_mega", "sft", str(file)], check=False).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status != 0:
        logs = directory / "sft/logs"
        raise UserError(f"the training ended with status {status}; see above and {logs}, then run the same again")


def _show(console: Console, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("model", "correct", "accuracy", "95% interval", title="Held-out problems, greedy")
    for name, rows in (("before", before), ("after SFT", after)):
        result = score(rows)
        low, high = result.interval
        table.add_row(name, f"{result.correct} of {result.total}", f"{result.accuracy:.1%}", f"{low:.1%} to {high:.1%}")
    console.print(table)
    samples = Table("question", "expected", "before", "after SFT", title="Answers", show_lines=True)
    for old, new in islice(zip(before, after, strict=True), SAMPLES):
        texts = (old["messages"][-1]["content"], old["ground_truth"], _visible(old["response"]), _visible(new["response"]))
        samples.add_row(*map(escape, texts))
    console.print(samples)


def _visible(text: str) -> str:
    """An untrained model says bytes of all kinds: none may command the terminal."""
    shown = "".join(char if char.isprintable() else "·" for char in text)
    return shown if len(shown) <= 60 else shown[:59] + "…"


def _next_steps(directory: Path, seconds: float) -> str:
    return f"""\
{seconds:.0f} s. In {directory}: data/ model/ before.jsonl sft.toml sft/ (metrics.jsonl checkpoints/ hf/ logs/) after.jsonl
Try next
  to ask it yourself:
    tulu-mega generate --model.path {directory}/sft/hf --model.dtype fp32
  to train the same on one process, to the same losses:
    tulu-mega sft {directory}/sft.toml --run_dir {directory}/sft-tp1 --parallel.tensor 1
  to see every setting:
    tulu-mega sft --help"""
