"""SFT by this project's own engine, out of the pieces of `recipes/sft.py`; what bench_sft.py times."""

from __future__ import annotations

import os

from laps import Laps, spec

from tulu_mega.config import SftSettings
from tulu_mega.data.cost import sequence_flops
from tulu_mega.data.loader import PackedLoader
from tulu_mega.data.store import TokenStore
from tulu_mega.launcher import World
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.recipes.session import opened


def main() -> None:
    wanted, laps = spec(), Laps()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings = SftSettings.model_validate(
        {
            "run_dir": wanted["scratch"],
            "model": {"path": wanted["model"], "dtype": "fp32"},
            "parallel": {"tensor": wanted["tensor"]},
            "data": {"train": wanted["texts"], "max_length": wanted["longest"], "pack_length": wanted["pack"], "shuffle": False},
            "train": {"epochs": 1.0, "global_batch": wanted["batch"], "reduction": "token_mean"},
            "optim": {"lr": wanted["lr"], "schedule": "constant", "warmup": 0.0},
        }
    )
    world = World(rank, size, rank, size, size // settings.parallel.model_parallel)
    with opened(settings, world, settings.seed) as session:
        session.load_weights()
        hf, place = session.engine.hf, session.topology
        cost = sequence_flops(hf.hidden_size, hf.intermediate_size, hf.num_hidden_layers, hf.vocab_size)
        loader = PackedLoader(
            TokenStore.open(wanted["store"]), settings.train, settings.data, settings.seed, session.align,
            place.data_rank, place.data, cost=cost, pipeline=session.pipeline,
        )  # fmt: skip
        session.engine.prepare_training(settings.optim, loader.steps)
        objective = SftObjective(settings.train.reduction)
        laps.ready()
        for step in range(loader.steps):
            if step % wanted["steps"] == 0:
                laps.begin()
                losses = []
            loss = session.engine.forward_backward(loader.batches(step).micro_batches, objective)
            session.engine.optimizer_step(step, loss.loss)
            losses.append(loss.loss)
            if (step + 1) % wanted["steps"] == 0:
                laps.end(losses=losses)


if __name__ == "__main__":
    main()
