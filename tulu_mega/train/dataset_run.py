"""A run that learns from a fixed data set: its data, weights, training loop and export."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tulu_mega.bridge.adapters import adapter_family
from tulu_mega.bridge.families import family_for
from tulu_mega.config import DataSettings, StageSettings, TrainSettings
from tulu_mega.data.loader import PackedLoader
from tulu_mega.data.store import REJECTS, TokenStore
from tulu_mega.distributed.collectives import same_everywhere, together
from tulu_mega.launch.launcher import World
from tulu_mega.launch.run_dir import CONFIG, DATA, HELDOUT
from tulu_mega.layout.cost import sequence_flops
from tulu_mega.layout.flops import head_columns, training_flops
from tulu_mega.train.engine import Objective
from tulu_mega.train.loop import FirstLoss, Fit, HeldOut
from tulu_mega.train.run import Run, opened_session
from tulu_mega.train.session import write_settings


@dataclass
class DatasetRun(Run):
    """A run on tokenised data."""

    settings: StageSettings
    store: TokenStore
    """The tokenised rows to train on."""

    def loader(self, columns: Mapping[str, np.ndarray] | None = None) -> PackedLoader:
        """Make the loader of the packed micro-batches of every step.

        Args:
            columns: see :class:`PackedLoader`.
        """
        return self._loader(self.store, self.settings.train, self.settings.data, columns)

    def heldout_store(self) -> TokenStore | None:
        """Open the tokenised rows to evaluate on, if the settings name some."""
        return TokenStore.open(self.run_dir / HELDOUT) if self.settings.heldout else None

    def heldout(self, store: TokenStore, objective: Objective, columns: Mapping[str, np.ndarray] | None = None) -> HeldOut:
        """Make the evaluation during training, of all rows once.

        Args:
            store: of :meth:`heldout_store`.
            objective: gives the reported means.
            columns: see :class:`PackedLoader`.
        """
        settings = self.settings.heldout
        once = TrainSettings(global_batch=settings.batch, epochs=1.0)
        unshuffled = self.settings.data.model_copy(update={"shuffle": False})
        return HeldOut(self._loader(store, once, unshuffled, columns), settings.every, objective)

    def fit(
        self, objective: Objective, loader: PackedLoader, heldout: HeldOut | None = None, first: FirstLoss | None = None
    ) -> None:
        """Train until the last step and export the model; go on from the newest checkpoint in the run directory.

        Args:
            first: checks the loss of the very first step, before any update.

        Raises:
            UserError: on every rank, for whatever the user can mend.
            Stopped: on every rank, when any received a signal to stop.
        """
        loader.check()
        found = self.weights(loader.steps)
        start = found.step if found else 0
        config = self.session.engine.hf.to_dict()
        with contextlib.ExitStack() as stack:
            log = None
            if self.session.lead:
                write_settings(self.settings, self.run_dir / CONFIG)
                print(self._banner(loader, start), flush=True)
                log = stack.enter_context(self.metrics(loader.steps, start))
            guards = self.guards(found)
            fit = Fit(
                engine=self.session.engine,
                loader=loader,
                objective=objective,
                guards=guards,
                saves=self.saves(loader.steps, guards),
                where=self.store.where,
                flops=lambda data: training_flops(config, self.store.lengths[data.rows], frozen=self.settings.lora is not None),
                log=log,
                profiler=self.profiler(start),
                heldout=heldout,
                first=first,
            )
            fit.run(start)
            self.export(guards, self.store.template, self.store.ends)

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
        return f"{self.session.topology} · {self.settings.model.path} · {self._adapters()}{kept} · {loader.steps:,} steps{at}"

    def _adapters(self) -> str:
        lora, config = self.session.engine.lora, self.session.engine.hf.to_dict()
        if lora is None:
            return ""
        model = family_for(config)
        thin = adapter_family(model, lora, config)
        trained, whole = (sum(map(math.prod, family.hf_shapes(config).values())) for family in (thin, model))
        return f"adapters of rank {lora.rank}, {trained:,} weights beside {whole:,} frozen ({trained / whole:.2%}) · "


@contextlib.contextmanager
def opened_run(settings: StageSettings, world: World, reward: bool = False) -> Iterator[DatasetRun]:
    """Join the world, build the model and open the tokenised data, which `preflight.check.ready` has put into the run directory.

    Args:
        reward: whether the model has a scalar head.

    Raises:
        UserError: on every rank, for whatever the user can mend.
    """
    with opened_session(settings, world, reward, lora=settings.lora) as session:
        with together("the tokenised data could not be opened"):
            store = TokenStore.open(Path(settings.run_dir, DATA))
        same_everywhere(f"the data in {store.directory}", store.key)
        yield DatasetRun(settings, session, store)
