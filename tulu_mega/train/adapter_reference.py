"""The model that a run with low-rank adapters began with, for comparisons: no second model is held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tulu_mega.records import PackedBatch
from tulu_mega.train.engine import Engine


class AdapterReference:
    """An engine's model with the adapters that are in it now, however they are trained later.

    New adapters add nothing yet, so that this is the bare model; others count as they were given.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        trained = (each for chunk in engine.chunks for each in chunk.parameters() if each.requires_grad)
        self._began = [(each, each.detach().clone()) for each in trained]

    @torch.no_grad()
    def score(self, micro_batches: Sequence[PackedBatch]) -> list[Tensor]:
        """As `Engine.score`; the trained adapters are in their places again when it returns, to the bit."""
        self._engine.settle()
        trained = [each.detach().clone() for each, _ in self._began]
        try:
            for each, began in self._began:
                each.copy_(began)
            return self._engine.score(micro_batches)
        finally:
            for (each, _), value in zip(self._began, trained, strict=True):
                each.copy_(value)
