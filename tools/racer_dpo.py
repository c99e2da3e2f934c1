"""DPO by this project's own engine, out of the pieces of `recipes/dpo.py`; what bench_dpo.py times."""

from __future__ import annotations

import os
from pathlib import Path

from laps import Laps, spec

from tulu_mega.config import DpoSettings
from tulu_mega.launcher import World
from tulu_mega.objectives.preference import PreferenceObjective
from tulu_mega.recipes.stage import opened_stage
from tulu_mega.reference import ReferenceCache, fill


def main() -> None:
    wanted, laps = spec(), Laps()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings = DpoSettings.model_validate(
        {
            "run_dir": wanted["run_dir"],
            "model": {"path": wanted["model"], "dtype": "fp32"},
            "parallel": {"tensor": wanted["tensor"]},
            "data": {"train": wanted["pairs"], "max_length": wanted["longest"], "pack_length": wanted["pack"], "shuffle": False},
            "train": {"epochs": 1.0, "global_batch": wanted["batch"]},
            "optim": {"lr": wanted["lr"], "schedule": "constant", "warmup": 0.0},
            "preference": {"loss": "dpo_norm", "beta": wanted["beta"]},
        }
    )
    world = World(rank, size, rank, size, size // settings.parallel.model_parallel)
    with opened_stage(settings, world) as stage:
        engine = stage.session.engine
        stage.initial_weights()
        cache = ReferenceCache.under(Path(wanted["run_dir"], "reference"), wanted["model"].replace("/", "_"), len(stage.store))
        fill(engine, stage.store, cache, cache.missing(), wanted["pack"], lambda line: None)
        loader = stage.loader({"ref_logp_S": cache.values()})
        engine.prepare_training(settings.optim, loader.steps)
        objective = PreferenceObjective(**settings.preference.model_dump())
        laps.ready()
        for step in range(loader.steps):
            if step % wanted["steps"] == 0:
                laps.begin()
                losses = []
            loss = engine.forward_backward(loader.batches(step).micro_batches, objective)
            engine.optimizer_step(step, loss.loss)
            losses.append(loss.loss)
            if (step + 1) % wanted["steps"] == 0:
                laps.end(losses=losses)


if __name__ == "__main__":
    main()
