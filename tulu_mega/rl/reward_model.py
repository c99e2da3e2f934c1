"""Scores of responses by a reward model, which runs on an engine of its own in the policy's layout."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tulu_mega.records import PackedBatch, Response, TokenizedRow
from tulu_mega.train.engine import Engine
from tulu_mega.train.scoring import score_rows


class RewardModelScores:
    """Scores whole conversations, from the prompt on, at the response's last token.

    Args:
        engine: the engine of a reward model that has the policy's tokenizer.
        capacity: tokens a packed micro-batch may hold.
    """

    def __init__(self, engine: Engine, capacity: int):
        self._engine, self._capacity = engine, capacity

    def __call__(self, responses: Sequence[Response]) -> list[float]:
        """Score responses: on rank 0 a score each, on other ranks nothing. Every rank calls this with the same responses."""
        sequences = [TokenizedRow(number, ids, ids) for number, ids in enumerate(response.token_ids for response in responses)]
        found = score_rows(self._engine, sequences, self._capacity, _at_the_end)
        return [found[number] for number in range(len(found))]


def _at_the_end(batch: PackedBatch, score_T: Tensor) -> dict[int, float]:
    rows = batch.rows_S[batch.segments_T[batch.ends_T]]
    return dict(zip(rows.tolist(), score_T[batch.ends_T].tolist(), strict=True))
