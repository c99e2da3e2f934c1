"""SFT runs of the quickstart's model in a few steps, and what comes of them; shared by the tests of stopping and going on."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path

from tests.lib import world
from tulu_mega.config import SftSettings, load
from tulu_mega.launch.launcher import World
from tulu_mega.preflight import check
from tulu_mega.quickstart import task, tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples/sft_tiny.toml"
PATIENCE = 180
"""Seconds; a start takes some 20 of them where four processes import torch on two cores."""


def make_material(directory: Path) -> Path:
    """A model and rows to train it on."""
    tiny_model.make(directory / "model", seed=0)
    rows = itertools.islice(task.demonstrations(seed=0), 48)
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def arguments(material: Path, run_dir: Path, steps: int, every: int) -> list[str]:
    values = {
        "run_dir": run_dir,
        "model.path": material / "model",
        "data.train": material / "train.jsonl",
        "train.steps": steps,
        "train.global_batch": 8,
        "checkpoint.every": every,
    }
    return [str(EXAMPLE), *(text for name, value in values.items() for text in (f"--{name}", str(value)))]


def run_sft(settings: SftSettings) -> None:
    from tulu_mega.recipes.sft import run

    rank = int(os.environ["RANK"])
    run(settings, World(rank, 2, rank, 2, 1))


def undisturbed(material: Path, run_dir: Path, steps: int, every: int) -> None:
    """The run without a launcher, on the tests' ranks."""
    settings = load(SftSettings, str(EXAMPLE), arguments(material, run_dir, steps, every)[1:])
    check.ready(settings)
    world.run(2, run_sft, settings, timeout=PATIENCE)


def outcome(run_dir: Path) -> tuple[list[tuple[int, float, float]], dict[str, str]]:
    """Step, loss and gradient norm of every step; digests of the exported files."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (run_dir / "hf").iterdir()}
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows], files


def steps_done(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("*.partial-*"))


def expect_same(run_dir: Path, reference: Path) -> None:
    assert outcome(run_dir) == outcome(reference)
    assert not saving(run_dir) and not list(run_dir.glob(".*.partial*"))
