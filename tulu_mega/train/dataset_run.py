"""What the stages share that learn from a fixed data set: data, weights, the loop and what surrounds it, the export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tulu_mega.config import DataSettings, StageSettings, TrainSettings
from tulu_mega.data.loader import PackedLoader, StepData
from tulu_mega.data.store import REJECTS, TokenStore
from tulu_mega.launch.launcher import World
from tulu_mega.launch.run_dir import CONFIG, DATA, HELDOUT, locked
from tulu_mega.layout.cost import sequence_flops
from tulu_mega.layout.flops import head_columns, training_flops
from tulu_mega.resilience.spikes import Spikes
from tulu_mega.resilience.stop_signal import Ending
from tulu_mega.train.engine import Objective
from tulu_mega.train.loop import FirstLoss, Fit, HeldOut
from tulu_mega.train.run import Run
from tulu_mega.train.session import opened, write_settings


@dataclass
class Stage(Run):
    """A run on tokenised data."""

    settings: StageSettings
    store: TokenStore

    def loader(self, columns: Mapping[str, np.ndarray] | None = None) -> PackedLoader:
        """The packed micro-batches of every step of the run.

        Args:
            columns: see :class:`PackedLoader`.
        """
        return self._loader(self.store, self.settings.train, self.settings.data, columns)

    def heldout_store(self) -> TokenStore | None:
        """The tokenised rows to evaluate on, if the settings name some."""
        return TokenStore.open(self.run_dir / HELDOUT) if self.settings.heldout else None

    def heldout(self, store: TokenStore, objective: Objective, columns: Mapping[str, np.ndarray] | None = None) -> HeldOut:
        """What is evaluated while training, all rows once.

        Args:
            store: of :meth:`heldout_store`.
            objective: what is reported of them.
            columns: see :class:`PackedLoader`.
        """
        settings = self.settings.heldout
        once = TrainSettings(global_batch=settings.batch, epochs=1.0)
        unshuffled = self.settings.data.model_copy(update={"shuffle": False})
        return HeldOut(self._loader(store, once, unshuffled, columns), settings.every, objective)

    def fit(
        self, objective: Objective, loader: PackedLoader, heldout: HeldOut | None = None, first: FirstLoss | None = None
    ) -> None:
        """Trains until the last step and exports the model; goes on from the newest checkpoint in the run directory.

        Args:
            first: looks at the loss of the very first step, before any update.

        Raises:
            UserError: on every rank, for whatever the user can mend.
            Stopped: on every rank, when one was asked to end.
        """
        loader.check()
        found = self.weights(loader.steps)
        start = found.step if found else 0
        skips = self.skips(self.settings.train.max_skipped)
        spikes = Spikes(self.settings.train.spike)
        if found:
            skips.restore(found.state)
            if "spikes" in found.state:  # not in checkpoints of before they were looked for
                spikes.restore(found.state["spikes"])
        engine, lead = self.session.engine, self.session.lead
        config = engine.hf.to_dict()

        def flops(data: StepData) -> float:
            return training_flops(config, self.store.lengths[data.rows])

        with contextlib.ExitStack() as stack:
            log = None
            if lead:
                write_settings(self.settings, self.run_dir / CONFIG)
                print(self._banner(loader, start), flush=True)
                log = stack.enter_context(self.metrics(loader.steps, start))
            fit = Fit(
                engine=engine,
                loader=loader,
                objective=objective,
                settings=self.settings.checkpoint,
                directory=self.checkpoints,
                skips=skips,
                where=self.store.where,
                flops=flops,
                log=log,
                ending=Ending(engine.platform.device),
                watch=self.session.watch,
                spikes=spikes,
                stragglers=self.stragglers(),
                heldout=heldout,
                first=first,
            )
            fit.run(start)
            self.export()

    def _loader(
        self, store: TokenStore, train: TrainSettings, data: DataSettings, columns: Mapping[str, np.ndarray] | None
    ) -> PackedLoader:
        hf, place = self.session.engine.hf, self.session.topology
        cost = sequence_flops(hf.hidden_size, hf.intermediate_size, hf.num_hidden_layers, head_columns(hf.to_dict()))
        return PackedLoader(
            store,
            train,
            data,
            self.settings.seed,
            self.session.align,
            place.data_rank,
            place.data,
            cost=cost,
            pipeline=self.session.pipeline,
            columns=columns,
        )

    def _banner(self, loader: PackedLoader, start: int) -> str:
        store = self.store
        rows = f"{len(store):,} sequences" if store.width == 1 else f"{len(store) // store.width:,} pairs"
        dropped = f" ({store.dropped:,} rows not used: {store.directory / REJECTS})" if store.dropped else ""
        at = f", going on after step {start}" if start else ""
        kept = f"{rows} of {int(store.lengths.sum()):,} tokens{dropped}"
        return f"{self.session.topology} · {self.settings.model.path} · {kept} · {loader.steps:,} steps{at}"


@contextlib.contextmanager
def opened_stage(settings: StageSettings, world: World, reward: bool = False) -> Iterator[Stage]:
    """Joins the world, builds the model and opens the tokenised data, which is in the run directory already (`preflight.ready`).

    Args:
        reward: the model has a scalar head.

    Raises:
        UserError: on every rank, for whatever the user can mend.
    """
    run_dir = Path(settings.run_dir)
    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            stack.enter_context(locked(run_dir))
        session = stack.enter_context(opened(settings, world, settings.seed, reward))
        yield Stage(settings, session, store=TokenStore.open(run_dir / DATA))
