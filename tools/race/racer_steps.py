"""What the racers of this project's own engine share: their settings, and optimizer steps timed by laps."""

from __future__ import annotations

from typing import Any

from laps import Laps

from tulu_mega.data.loader import PackedLoader
from tulu_mega.train.engine import Engine, Objective


def settings(wanted: dict[str, Any], run_dir: str, rows: str, **train: Any) -> dict[str, Any]:
    """Of a command, as far as all of them have them: float32, a constant rate, rows in their order, once.

    Args:
        wanted: what the race says.
        rows: the file to train on.
        train: more of the settings of that table.
    """
    return {
        "run_dir": run_dir,
        "model": {"path": wanted["model"], "dtype": "fp32"},
        "parallel": {"tensor": wanted["tensor"]},
        "data": {"train": rows, "max_length": wanted["longest"], "pack_length": wanted["pack"], "shuffle": False},
        "train": {"epochs": 1.0, "global_batch": wanted["batch"]} | train,
        "optim": {"lr": wanted["lr"], "schedule": "constant", "warmup": 0.0},
    }


def timed(laps: Laps, engine: Engine, loader: PackedLoader, objective: Objective, steps: int) -> None:
    """Trains until the loader's last step.

    Args:
        steps: of a lap.
    """
    laps.ready()
    losses: list[float] = []
    for step in range(loader.steps):
        if step % steps == 0:
            laps.begin()
            losses = []
        loss = engine.forward_backward(loader.batches(step).micro_batches, objective)
        engine.optimizer_step(step, loss)
        losses.append(loss.loss)
        if (step + 1) % steps == 0:
            laps.end(losses=losses)
