"""DPO by this project's own engine, out of the pieces of `recipes/dpo.py`; what bench_dpo.py times."""

from __future__ import annotations

import os
from pathlib import Path

import prepared  # noqa: F401  before what imports megatron-core
from laps import Laps, spec
from racer_steps import settings, timed

from tulu_mega.config import DpoSettings
from tulu_mega.launch.launcher import World
from tulu_mega.objectives.preference_objective import PreferenceObjective
from tulu_mega.train.dataset_run import opened_run
from tulu_mega.train.reference_cache import ReferenceCache, fill


def main() -> None:
    wanted, laps = spec(), Laps()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = {"preference": {"loss": "dpo_norm", "beta": wanted["beta"]}}
    given = DpoSettings.model_validate(settings(wanted, wanted["run_dir"], wanted["pairs"]) | own)
    world = World(rank, size, rank, size, size // given.parallel.model_parallel)
    with opened_run(given, world) as training:
        engine = training.session.engine
        training.initial_weights()
        cache = ReferenceCache.under(Path(wanted["run_dir"], "reference"), wanted["model"].replace("/", "_"), len(training.store))
        fill(engine, training.store, cache, cache.missing(), wanted["pack"], lambda line: None)
        loader = training.loader({"ref_logp_S": cache.values()})
        engine.prepare_training(given.optim, loader.steps)
        objective = PreferenceObjective.of(given.preference)
        timed(laps, engine, loader, objective, wanted["steps"])


if __name__ == "__main__":
    main()
