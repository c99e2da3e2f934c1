"""SFT by this project's own engine, out of the pieces of `recipes/sft.py`; what bench_sft.py times."""

from __future__ import annotations

import os

import prepared  # noqa: F401  before what imports megatron-core
from laps import Laps, spec
from racer_steps import settings, timed

from tulu_mega.config import SftSettings
from tulu_mega.data.loader import PackedLoader
from tulu_mega.data.store import TokenStore
from tulu_mega.launch.launcher import World
from tulu_mega.layout.cost import sequence_flops
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.train.session import opened


def main() -> None:
    wanted, laps = spec(), Laps()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    given = SftSettings.model_validate(settings(wanted, wanted["scratch"], wanted["texts"], reduction="token_mean"))
    world = World(rank, size, rank, size, size // given.parallel.model_parallel)
    with opened(given, world, given.seed) as session:
        session.load_weights()
        hf, place = session.engine.hf, session.topology
        cost = sequence_flops(hf.hidden_size, hf.intermediate_size, hf.num_hidden_layers, hf.vocab_size)
        loader = PackedLoader(
            TokenStore.open(wanted["store"]), given.train, given.data, given.seed, session.align,
            place.data_rank, place.data, cost=cost, pipeline=session.pipeline,
        )  # fmt: skip
        session.engine.prepare_training(given.optim, loader.steps)
        objective = SftObjective(given.train.reduction)
        timed(laps, session.engine, loader, objective, wanted["steps"])


if __name__ == "__main__":
    main()
