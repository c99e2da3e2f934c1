"""What ranks do in the tests of pair objectives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.lib import jobs
from tests.lib.oracles.pair_losses import Scored, pair_loss
from tulu_mega.config import OptimSettings, PreferenceSettings
from tulu_mega.data.loader import by_segment
from tulu_mega.objectives.preference_objective import PreferenceObjective
from tulu_mega.records import IGNORE

LENGTHS = [40, 16, 64, 9, 33, 5, 21, 50, 8, 12]
"""five pairs, so that no split of them is even"""


def reference(directory: str) -> np.ndarray:
    """Sums that another model might have given: the model's own, moved a little."""
    own = np.array([float(value) for value in _sums(_model(directory))])
    return own + np.random.default_rng(7).normal(0, 3, len(own))


def hugging_face(directory: str, objectives: dict[str, dict[str, Any]], ref: np.ndarray) -> dict[str, tuple[float, float]]:
    """Loss and gradient norm by transformers and autograd, one sequence at a time, sums in float64."""
    model, found = _model(directory), {}
    trained = [sum(label != IGNORE for label in s.labels[1:]) for s in _sequences(model.config.vocab_size)]
    for name, settings in objectives.items():
        model.zero_grad()
        logp = _sums(model)
        asked, total = PreferenceSettings(**settings), 0.0
        for c in range(0, len(logp), 2):
            r = c + 1
            total = total + pair_loss(asked, *(Scored(logp[at], trained[at], ref[at]) for at in (c, r)))
        loss = total / (len(logp) // 2)
        loss.backward()
        norm = torch.sqrt(sum(p.grad.double().pow(2).sum() for p in model.parameters()))
        found[name] = float(loss.detach()), float(norm)
    return found


def engine(
    directory: str, layout: dict[str, Any], micro_batches: int | None, objectives: dict[str, dict[str, Any]], ref: np.ndarray
) -> dict[str, Any]:
    """The same by the engine: (loss, gradient norm, metrics, the loss that `evaluate` gives) by objective."""
    with jobs.session(directory, layout) as made:
        batch = _sequences(made.engine.hf.vocab_size)
        micro = jobs.share(made, batch, micro_batches, together=2)
        micro = [one.with_columns(ref_logp_S=by_segment(one, ref)) for one in micro]
        made.engine.prepare_training(OptimSettings(name="sgd", lr=0.0, schedule="constant", warmup=0.0, clip=0.0), 1)
        found = {}
        for name, settings in objectives.items():
            objective = PreferenceObjective.of(PreferenceSettings(**settings))
            evaluated = made.engine.evaluate(micro, objective)
            loss = made.engine.forward_backward(micro, objective)
            norm = made.engine.optimizer_step(0, loss.loss).grad_norm
            found[name] = (loss.loss, norm, loss.metrics, evaluated.loss, loss.count)
        return found


def _model(directory: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def _sequences(vocab: int):
    return jobs.sequences(vocab, LENGTHS)


def _sums(model) -> list[torch.Tensor]:
    made = []
    for sequence in _sequences(model.config.vocab_size):
        ids, labels = torch.tensor(sequence.input_ids), torch.tensor(sequence.labels)
        logp = -F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        made.append(logp[labels[1:] != IGNORE].double().sum())
    return made
