"""Sampled responses as the packed mini-batches that a policy learns from."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Series
from dataclasses import dataclass, replace

from torch import Tensor

from tulu_mega.data.batch import by_token, pack_prefix_groups
from tulu_mega.data.prefix_sharing import plan_prefix_groups
from tulu_mega.layout.packing_rules import pack_alignment, pipeline_of
from tulu_mega.records import IGNORE, PackedBatch, Sequence
from tulu_mega.train.engine import Engine
from tulu_mega.train.scoring import flops_of


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


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step is made of, as a data-parallel rank has it."""

    packs: list[PackedBatch]
    """its micro-batches"""
    own_tokens: int
    """tokens of these without padding"""
    repeated: list[int]
    """lengths of the prompts, on all ranks, that others in the same pack were spared by having them already"""


def packed(engine: Engine, responses: Series[Response], capacity: int, share: bool = True) -> MiniBatch:
    """A mini-batch in packs, with what each token was sampled with and its advantage.

    Args:
        responses: the same on every rank.
        capacity: tokens a packed micro-batch may hold.
        share: whether neighbours with the same prompt have its tokens once, where the engine takes such packs.
    """
    share = share and engine.whole_packs
    align, pipeline = pack_alignment(engine.settings), pipeline_of(engine.hf.to_dict(), engine.settings)
    sequences = [response.sequence for response in responses]
    plan = plan_prefix_groups(sequences, engine.topology.data, capacity, align, flops_of(engine.hf), pipeline, share)
    logp = {response.number: response.sampler_logp for response in responses}
    advantages = {response.number: [response.advantage] * len(response.response_ids) for response in responses}
    own = plan[engine.topology.data_rank]
    packs = [pack_prefix_groups(groups, align) for groups in own]
    return MiniBatch(
        [replace(pack, sampler_logp_T=by_token(pack, logp), advantages_T=by_token(pack, advantages)) for pack in packs],
        sum(group.size for groups in own for group in groups),
        [group.shared for rank in plan for groups in rank for group in groups for _ in group.sequences[1:]],
    )


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
