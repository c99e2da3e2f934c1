"""Preference tuning (Tulu 3, arXiv 2411.15124, section 5): length-normalised DPO, the reference scored beforehand."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch

from tulu_mega.config import DpoSettings
from tulu_mega.data.store import TokenStore
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import World
from tulu_mega.model.config import DTYPES
from tulu_mega.objectives.preference_objective import PreferenceObjective
from tulu_mega.pins.ranks import known
from tulu_mega.train import reference_cache
from tulu_mega.train.batch_loss import BatchLoss
from tulu_mega.train.dataset_run import DatasetRun, opened_run

REFERENCE = "reference"
"""The run's own cache of reference log-probabilities."""


def run(settings: DpoSettings, world: World) -> None:
    """Trains until the last step and exports the model; goes on from the newest checkpoint in the run directory.

    The reference is the model that the run starts from. Its log-probabilities are scored before the first step, and kept: no
    step holds or runs a second model.

    Raises:
        UserError: on every rank, for whatever the user can mend.
    """
    objective = PreferenceObjective.of(settings.preference)
    with opened_run(settings, world, reward=False) as training:
        columns, first = (lambda store: None), None
        if settings.preference.reads_reference:
            weights = _digest(training)
            columns = functools.partial(_reference, training, weights)
            first = functools.partial(check_first_loss, settings, objective)
        loader = training.loader(columns(training.store))
        heldout = training.heldout_store()
        evaluated = training.heldout(heldout, objective, columns(heldout)) if heldout else None
        if not settings.reference.only:
            training.fit(objective, loader, evaluated, first)


def _digest(training: DatasetRun) -> str:
    """Return the digest of the reference's weights, with which the run begins: the model's, and those of adapters."""
    places, lora = [("model.path", training.session.source)], training.settings.lora
    if lora and lora.adapter:
        places.append(("lora.adapter", Path(lora.adapter)))
    found = (reference_cache.weights_digest(place, known(training.run_dir, setting)) for setting, place in places)
    return "-".join(found)


def _reference(training: DatasetRun, weights: str, store: TokenStore) -> dict[str, np.ndarray]:
    """For each sequence the initial weights' sum of log-probabilities; from the cache, completed where it lacks some.

    Args:
        weights: their digest.
    """
    settings = training.settings
    computed = settings.precision.megatron | settings.megatron
    key = reference_cache.content_key(weights, settings.model.dtype, computed, store)
    root = Path(settings.reference.cache).expanduser() if settings.reference.cache else training.run_dir / REFERENCE
    cache = reference_cache.ReferenceCache.under(root, key, len(store))
    if missing := reference_cache.missing_parts(cache):
        training.initial_weights()  # never those of a checkpoint: that would be another reference
        capacity = settings.data.pack_length or 2 * settings.data.max_length
        reference_cache.fill(training.session.engine, store, cache, missing, capacity, functools.partial(print, flush=True))
    return {"ref_logp_S": cache.values()}


def check_first_loss(settings: DpoSettings, objective: PreferenceObjective, loss: BatchLoss) -> None:
    """Before the first update the policy is the reference: margins are 0 and the loss is what it says of itself then.

    What rounding may add, by a token: a logit of up to 2^4 is off by its last place once in the reference's pass and once in this
    one, which is packed otherwise: 2^5 u, u being the precision's unit roundoff. That may be so of all tokens of both responses,
    so that the difference d of a pair, which has to be 0, is let pass up to D = 2 2^5 u for means, times the tokens of a response
    for sums. Margins beta d then reach beta D, and each loss says how far D takes it.

    Raises:
        UserError: on every rank, when the difference is more than that.
    """
    asked = objective.loss
    token = 2**5 * torch.finfo(DTYPES[settings.model.dtype]).eps / 2
    difference = 2 * token * (1 if asked.of_means else settings.data.max_length)
    found = [("the mean margin", loss.metrics["margin"], 0.0, asked.beta * difference)]
    if not objective.sft_weight:
        found.append(("the loss", loss.loss, asked.at_reference(), asked.tolerance(difference)))
    problems = [
        f"{name} is {value:.6g}, expected {wanted:.6g} within {allowed:.2g}"
        for name, value, wanted, allowed in found
        if not abs(value - wanted) <= allowed
    ]
    if problems:
        raise UserError(
            f"before the first update the policy has to equal the reference, but {' and '.join(problems)}. The forward pass is "
            "not the same twice: leave dropout out of [megatron]"
        )
