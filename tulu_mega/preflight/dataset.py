"""What is wrong with a stage that learns from a fixed data set."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tulu_mega.config import StageSettings
from tulu_mega.data.loader import steps_of
from tulu_mega.data.store import TokenStore
from tulu_mega.errors import UserError
from tulu_mega.launch.run_dir import DATA, HELDOUT
from tulu_mega.layout.schedule import Pipeline
from tulu_mega.preflight import adapters, profile, run
from tulu_mega.preflight.findings import Findings, Rows


def problems(settings: StageSettings, findings: Findings, reward: bool = False) -> None:
    """Find problems of the run and its schedule; add the rows that have to be tokenised to the findings.

    Args:
        reward: it trains a reward model.
    """
    run.problems(settings, findings, reward, short_batches=True)
    adapters.problems(settings, findings, reward)
    findings.collect(lambda: _schedulable(settings))
    run_dir = Path(settings.run_dir)
    if settings.heldout:
        own = {"train": settings.heldout.data, "split": settings.heldout.split}
        findings.rows.append(Rows("heldout.data", settings.data.model_copy(update=own), settings.model, run_dir / HELDOUT))
    look = partial(_long_enough, settings)
    findings.rows.append(Rows("data.train", settings.data, settings.model, run_dir / DATA, look))


def reward_model_problems(settings: StageSettings, findings: Findings) -> None:
    """Find problems as `problems` does, for a stage that trains a reward model."""
    problems(settings, findings, reward=True)


def _long_enough(settings: StageSettings, store: TokenStore) -> None:
    """The run has the steps that are to be profiled."""
    profile.check_steps(settings.train.profile, steps_of(settings.train, len(store) // store.width))


def _schedulable(settings: StageSettings) -> None:
    """What packing would find out in every rank."""
    parallel, count = settings.parallel, settings.train.micro_batches
    multiple = Pipeline(parallel.pipeline, parallel.virtual_pipeline).multiple
    if count and count % multiple:
        raise UserError(
            f"train.micro_batches = {count}: parallel.virtual_pipeline = {parallel.virtual_pipeline} asks for a multiple of "
            f"parallel.pipeline = {parallel.pipeline}; set it to {-(-count // multiple) * multiple} or leave it out"
        )
