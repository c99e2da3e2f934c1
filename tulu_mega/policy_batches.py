"""Sampled responses as the packed mini-batches that a policy learns from."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Series
from dataclasses import dataclass, replace

from torch import Tensor

from tulu_mega.data.batch import by_token
from tulu_mega.engine import Engine
from tulu_mega.packed_scoring import packed_share
from tulu_mega.records import IGNORE, PackedBatch, Sequence


@dataclass(frozen=True)
class Response:
    """What training needs of a response."""

    number: int
    """of the response in its step"""
    prompt_ids: list[int]
    response_ids: list[int]
    sampler_logp: list[float]
    advantage: float

    @property
    def sequence(self) -> Sequence:
        """Prompt and response, of which the response is trained."""
        return Sequence(self.number, self.prompt_ids + self.response_ids, [IGNORE] * len(self.prompt_ids) + self.response_ids)


def split(groups: Series[Series[Response]], parts: int) -> list[list[Response]]:
    """Whole groups to mini-batches of about as many, in their order; fewer mini-batches where there are fewer groups."""
    parts = min(parts, len(groups))
    bounds = [len(groups) * part // parts for part in range(parts + 1)]
    return [[response for group in groups[a:b] for response in group] for a, b in zip(bounds, bounds[1:], strict=False)]


def packed(engine: Engine, responses: Series[Response], capacity: int) -> list[PackedBatch]:
    """This rank's micro-batches of a mini-batch, with what each token was sampled with and its advantage.

    Args:
        responses: the same on every rank.
        capacity: tokens a packed micro-batch may hold.
    """
    by_number = {response.number: response for response in responses}
    logp = {number: response.sampler_logp for number, response in by_number.items()}
    advantages = {number: [response.advantage] * len(response.response_ids) for number, response in by_number.items()}
    return [
        replace(batch, sampler_logp_T=by_token(batch, logp), advantages_T=by_token(batch, advantages))
        for batch in packed_share(engine, [response.sequence for response in responses], capacity)
    ]


def scored(engine: Engine, batches: list[PackedBatch], column: str) -> list[PackedBatch]:
    """The same packs with a model's log-probabilities, computed as training will: equal weights give equal bits.

    Args:
        column: the field of :class:`PackedBatch` to fill. Ranks that see no log-probabilities leave it empty: nobody reads it.
    """
    return with_column(batches, column, engine.score(batches))


def with_column(batches: list[PackedBatch], column: str, found: Series[Tensor]) -> list[PackedBatch]:
    """The same packs with a field filled; as they are where nothing was found.

    Args:
        found: [T] of each pack, or none at all.
    """
    return [replace(batch, **{column: each_T.cpu()}) for batch, each_T in zip(batches, found, strict=True)] if found else batches


def differences(batches: Iterable[PackedBatch]) -> dict[int, tuple[float, float]]:
    """By response: mean and largest |log-probability by the sampler less that by the trainer's same weights|.

    Args:
        batches: whole packs with ``old_logp_T``.
    """
    found = {}
    for batch in batches:
        apart_T = (batch.sampler_logp_T - batch.old_logp_T).abs()
        for segment, number in enumerate(batch.rows_S.tolist()):
            if number >= 0:
                apart = apart_T[(batch.segments_T == segment) & batch.loss_mask_T]
                found[number] = float(apart.mean()), float(apart.max())
    return found


def own_tokens(batches: Iterable[Series[PackedBatch]], responses: Iterable[Response]) -> int:
    """Tokens of a rank's packs without padding."""
    lengths = {response.number: len(response.prompt_ids) + len(response.response_ids) for response in responses}
    return sum(lengths[number] for part in batches for pack in part for number in pack.rows_S.tolist() if number >= 0)
