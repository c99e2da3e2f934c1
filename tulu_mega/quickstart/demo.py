"""The quickstart's story: make a task and a model, ask it, fine-tune it with the real command, ask again, compare."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega.config import ModelSettings
from tulu_mega.errors import UserError
from tulu_mega.evaluation.settings import EvalSettings, TaskSettings
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


def run(settings: QuickstartSettings) -> None:
    """Makes, asks, trains, asks again and prints what came of it. What is complete in `run_dir` is not done again.

    Args:
        settings: `run_dir`, `seed` and `steps`.

    Raises:
        UserError: the directory holds a quickstart with other settings, vLLM is missing, or the training failed.
    """
    from rich.console import Console

    from tulu_mega.rollout.vllm_process import check_vllm

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
    before = evaluated(model, heldout, directory / "before")

    console.rule("3. tulu-mega sft: 2 processes, Megatron tensor and sequence parallel")
    _once(trained, lambda: _train(directory, settings.seed, settings.steps))

    console.rule("4. vLLM answers the held-out problems, after")
    after = evaluated(trained, heldout, directory / "sft/eval")

    console.rule("what came of it")
    _show(console, directory, before, after)
    console.print(_next_steps(directory, time.monotonic() - started), highlight=False, soft_wrap=True)


def make_data(directory: Path, seed: int) -> None:
    """Writes `train.jsonl` (demonstrations) and `heldout.jsonl` (questions), where they are not there yet."""
    train, heldout = directory / "train.jsonl", directory / "heldout.jsonl"
    _once(train, lambda: task.write_jsonl(islice(task.demonstrations(seed), DEMONSTRATIONS), train))
    problems = islice(task.problems("heldout", seed, HELDOUT_TWO_STEP), HELDOUT_PROBLEMS)
    _once(heldout, lambda: task.write_jsonl(map(task.prompt_row, problems), heldout))


def evaluated(model: Path, questions: Path, output: Path) -> dict[str, Any]:
    """What `tulu-mega eval` finds: the score with its interval. What is answered in `output` is not asked again."""
    from tulu_mega.evaluation.run import evaluate

    results = evaluate(
        EvalSettings(
            model=ModelSettings(path=str(model), dtype="fp32"),
            output=str(output),
            tasks={"rlvr": TaskSettings(data=str(questions), max_tokens=MAX_TOKENS)},
        )
    )
    return results["tasks"]["rlvr"]


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


def _show(console: Console, directory: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("model", "correct", "accuracy", "95% interval", title="Held-out problems, greedy")
    for name, result in (("before", before), ("after SFT", after)):
        score, total = result["metrics"]["score"], result["problems"]
        interval = f"{score['low']:.1%} to {score['high']:.1%}"
        table.add_row(name, f"{round(score['value'] * total)} of {total}", f"{score['value']:.1%}", interval)
    console.print(table)
    samples = Table("question", "expected", "before", "after SFT", title="Answers", show_lines=True)
    for old, new in islice(zip(_samples(directory / "before"), _samples(directory / "sft/eval"), strict=True), SAMPLES):
        said = (_visible(record["responses"][0]["response"]) for record in (old, new))
        samples.add_row(*map(escape, (old["messages"][-1]["content"], old["answer"], *said)))
    console.print(samples)


def _samples(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples/rlvr.jsonl").read_text(encoding="utf-8").splitlines()]


def _visible(text: str) -> str:
    """An untrained model says bytes of all kinds: none may command the terminal."""
    shown = "".join(char if char.isprintable() else "·" for char in text)
    return shown if len(shown) <= 60 else shown[:59] + "…"


def _next_steps(directory: Path, seconds: float) -> str:
    return f"""\
{seconds:.0f} s. In {directory}: data/ model/ before/ sft.toml sft/ (metrics.jsonl checkpoints/ hf/ eval/ logs/)
Try next
  to ask it yourself:
    tulu-mega generate --model.path {directory}/sft/hf --model.dtype fp32
  to see how the training went, in {directory}/sft/report.html:
    tulu-mega report {directory}/sft
  to train the same on one process, to the same losses:
    tulu-mega sft {directory}/sft.toml --run_dir {directory}/sft-tp1 --parallel.tensor 1
  to see every setting:
    tulu-mega sft --help"""
