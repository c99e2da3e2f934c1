"""Packs responses into the mini-batches that a policy learns from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tulu_mega.data.batch import by_token, pack_prefix_groups
from tulu_mega.data.prefix_sharing import plan_prefix_groups
from tulu_mega.layout.packing_rules import pack_alignment, pipeline_of
from tulu_mega.records import PackedBatch, Response, TokenizedRow
from tulu_mega.train.adapter_reference import AdapterReference
from tulu_mega.train.engine import Engine
from tulu_mega.train.scoring import flops_of

_MOST = 300.0
"""Differences of log-probabilities are cut here, so that squares of their ratios are numbers."""


@dataclass(frozen=True)
class TrainedResponse:
    """A response that a step trains on."""

    number: int
    """number of the response among all those of the step"""
    response: Response
    advantage: float

    @property
    def sequence(self) -> TokenizedRow:
        """The row that is packed: all tokens, of which those of trained segments are trained."""
        return TokenizedRow(self.number, self.response.token_ids, self.response.labels)


def split(groups: Sequence[Sequence[TrainedResponse]], parts: int) -> list[list[TrainedResponse]]:
    """Whole groups in mini-batches of about as many groups each, in order; fewer mini-batches where there are fewer groups."""
    parts = min(parts, len(groups))
    bounds = [len(groups) * part // parts for part in range(parts + 1)]
    return [[response for group in groups[a:b] for response in group] for a, b in zip(bounds, bounds[1:], strict=False)]


@dataclass(frozen=True)
class MiniBatch:
    """A data-parallel rank's share of one optimizer step."""

    packs: list[PackedBatch]
    """the micro-batches"""
    own_tokens: int
    """tokens of the packs without padding"""
    repeated: list[int]
    """lengths of the prefixes that were left out, on all ranks, because a neighbour in the pack has them already"""


def packed(
    engine: Engine, responses: Sequence[TrainedResponse], capacity: int, share: bool = True, ends: bool = False
) -> MiniBatch:
    """A mini-batch in packs, with the sampler's log-probability of each trained token and its advantage.

    Args:
        responses: the same on every rank.
        capacity: tokens a packed micro-batch may hold.
        share: whether the tokens of a prompt come once for neighbours that have it in common, where the engine takes such
            packs.
        ends: whether the packs hold each response's last token, on which a value model is read.
    """
    share = share and engine.whole_packs
    align, pipeline = pack_alignment(engine.settings), pipeline_of(engine.hf.to_dict(), engine.settings)
    sequences = [response.sequence for response in responses]
    plan = plan_prefix_groups(sequences, engine.topology.data, capacity, align, flops_of(engine.hf), pipeline, share, ends)
    logp = {one.number: one.response.sampler_logp for one in responses}
    advantages = {one.number: [one.advantage] * one.response.num_trained for one in responses}
    own = plan[engine.topology.data_rank]
    packs = [pack_prefix_groups(groups, align) for groups in own]
    return MiniBatch(
        [pack.with_columns(sampler_logp_T=by_token(pack, logp), advantages_T=by_token(pack, advantages)) for pack in packs],
        sum(group.size for groups in own for group in groups),
        [group.shared for rank in plan for groups in rank for group in groups for _ in group.sequences[1:]],
    )


def scored(engine: Engine | AdapterReference, batches: list[PackedBatch], column: str) -> list[PackedBatch]:
    """The same packs with a model's log-probabilities, computed as in training: equal weights give equal bits.

    Args:
        column: the column of :class:`PackedBatch` to add. Ranks that see no log-probabilities do without: nobody reads it there.
    """
    return with_column(batches, column, engine.score(batches))


def with_column(batches: list[PackedBatch], column: str, found: Sequence[Tensor]) -> list[PackedBatch]:
    """The same packs with a further column; unchanged where nothing was found.

    Args:
        found: a tensor [T] for each pack, or none at all.
    """
    return [batch.with_columns(**{column: each.cpu()}) for batch, each in zip(batches, found, strict=True)] if found else batches


class Compared(NamedTuple):
    """A response's log-probabilities by the sampler, compared with the trainer's by the weights before the step."""

    mean: float
    """mean absolute difference"""
    largest: float
    """largest of these"""
    weights: float
    """sum of the ratios of the trainer's probabilities to the sampler's, as no cap has cut them"""
    squares: float
    """sum of their squares"""
    tokens: int


def effective_share(compared: Iterable[Compared]) -> float:
    """The effective sample size of the ratios' weights, over the number of tokens: 1 where all are equal."""
    weights = squares = 0.0
    tokens = 0
    for one in compared:
        weights, squares, tokens = weights + one.weights, squares + one.squares, tokens + one.tokens
    return weights**2 / (squares * tokens)


def differences(batches: Iterable[PackedBatch]) -> dict[int, Compared]:
    """The comparison of each response's log-probabilities, by its number.

    Args:
        batches: whole packs with the columns ``sampler_logp_T`` and ``old_logp_T``.
    """
    found = {}
    for batch in batches:
        apart_T = batch.column("old_logp_T") - batch.column("sampler_logp_T")
        for segment, number in enumerate(batch.rows_S.tolist()):
            if number >= 0:
                own_T = (batch.segments_T == segment) & batch.loss_mask_T
                apart, ratios = apart_T[own_T].abs(), apart_T[own_T].double().clamp(max=_MOST).exp()
                told = (float(each) for each in (apart.mean(), apart.max(), ratios.sum(), ratios.square().sum()))
                found[number] = Compared(*told, len(ratios))
    return found
