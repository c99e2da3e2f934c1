"""A reward model's scores of responses, by the engine and under the layout of the policy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tulu_mega.records import PackedBatch, Rollout, TokenizedRow
from tulu_mega.train.engine import Engine
from tulu_mega.train.scoring import score_rows


class RewardModelScores:
    """Scores whole conversations, prompt and response, at the response's last token.

    Args:
        engine: of a reward model whose tokens are the policy's.
        capacity: tokens a packed micro-batch may hold.
    """

    def __init__(self, engine: Engine, capacity: int):
        self._engine, self._capacity = engine, capacity

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Every rank calls it with the same responses; rank 0 gets the scores, the others nothing."""
        sequences = [
            TokenizedRow(number, ids, ids)
            for number, ids in enumerate(rollout.prompt_ids + rollout.response_ids for rollout in rollouts)
        ]
        found = score_rows(self._engine, sequences, self._capacity, _at_the_end)
        return [found[number] for number in range(len(found))]


def _at_the_end(batch: PackedBatch, score_T: Tensor) -> dict[int, float]:
    rows = batch.rows_S[batch.segments_T[batch.ends_T]]
    return dict(zip(rows.tolist(), score_T[batch.ends_T].tolist(), strict=True))
