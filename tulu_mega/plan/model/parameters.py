"""Parameters that a rank holds, to the last one: from the family's table, the layout and the split into stages.

Every tensor rank of a stage holds shards of the same shapes; vocabulary padding is spread over all of them. Stage s of R pipeline
ranks with C chunks each (s from 0 to R x C - 1, in the model's order) is chunk s div R of rank s mod R, as in `stages`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.rules import Cut, Rule, Shape
from tulu_mega.config import ParallelSettings
from tulu_mega.distributed.grid import ShardGrid
from tulu_mega.layout.stages import stage_layers

ITEMSIZE: dict[str, int] = {"bf16": 2, "fp32": 4}
"""Bytes of an element, by `model.dtype`."""
Part = Literal["embedding", "layers", "norms", "head"]


@dataclass(frozen=True)
class Shard:
    """One parameter as a tensor rank of a stage holds it."""

    name: str
    """megatron-core's within the whole model, with the layer's number there, in the local layer specification"""
    shape: Shape
    part: Part
    replicated: bool
    """whether every tensor rank holds all of it"""
    copy: bool = False
    """whether it is a head tied to the embedding of the first stage: under pipeline parallelism only"""

    @property
    def count(self) -> int:
        """Elements, vocabulary padding among them."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Parameters:
    """Elements by part, vocabulary padding among them; adds up."""

    embedding: int = 0
    layers: int = 0
    """matrices and biases of the layers, without norms"""
    norms: int = 0
    """elements of the layers' norms and of the final one"""
    head: int = 0

    @property
    def total(self) -> int:
        """All elements."""
        return self.embedding + self.layers + self.norms + self.head

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


def model_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of the whole model as transformers counts them: no padding, a tied head once.

    Args:
        config: Hugging Face's config.json.

    Raises:
        UserError: for a config that no family can read.
    """
    return sum(map(math.prod, family_for(config).hf_shapes(config).values()))


def stage_shards(
    config: Mapping[str, Any], parallel: ParallelSettings, stage: int, split: Sequence[int] | None = None
) -> list[Shard]:
    """Every parameter of a stage, in the table's order, layer by layer.

    Args:
        config: as for :func:`model_parameters`.
        stage: from 0 to PP x VPP - 1.
        split: layers of every stage; those of `stage_layers` when unset.

    Raises:
        UserError: for a size that the tensor ranks do not divide, or layers that do not go into the stages.
    """
    family, counts = family_for(config), split or stage_layers(config, parallel)
    first, last = stage == 0, stage == len(counts) - 1
    layers = range(sum(counts[:stage]), sum(counts[: stage + 1]))
    before, inside, after = [], [], []
    for rule in family.rules:
        pattern = rule.megatron[0]
        tied = family.head in rule.hf and family.is_tied(config)
        shape = family.local_shape(pattern.format(i=0), config, ShardGrid(tensor=parallel.tensor))
        if "{i}" in pattern:
            inside.append((pattern, shape, rule))
        elif family.embedding in rule.hf:
            before += [_shard(pattern, shape, rule)] if first else []
        elif last and not (tied and first):
            after.append(_shard(pattern, shape, rule, copy=tied))
    middle = [_shard(pattern.format(i=layer), shape, rule) for layer in layers for pattern, shape, rule in inside]
    return [*before, *middle, *after]


def stage_parameters(
    config: Mapping[str, Any], parallel: ParallelSettings, stage: int, split: Sequence[int] | None = None
) -> Parameters:
    """Elements that each tensor rank of a stage holds. Arguments and errors of :func:`stage_shards`."""
    counts = dict.fromkeys((each.name for each in fields(Parameters)), 0)
    for shard in stage_shards(config, parallel, stage, split):
        counts[shard.part] += shard.count
    return Parameters(**counts)


def rank_parameters(
    config: Mapping[str, Any], parallel: ParallelSettings, rank: int, split: Sequence[int] | None = None
) -> Parameters:
    """Elements that a pipeline rank holds, all its chunks together; times `ITEMSIZE` these are the bytes of its weights.

    Args:
        config: as for :func:`model_parameters`.
        rank: in the pipeline, from 0.
        split: as for :func:`stage_shards`.

    Raises:
        UserError: as :func:`stage_shards`.
    """
    stages = range(rank, parallel.pipeline * parallel.virtual_pipeline, parallel.pipeline)
    return sum((stage_parameters(config, parallel, stage, split) for stage in stages), Parameters())


def _shard(name: str, shape: Shape, rule: Rule, copy: bool = False) -> Shard:
    return Shard(name, shape, _part(name), rule.cut is Cut.COPY, copy)


def _part(name: str) -> Part:
    if "norm" in name:
        return "norms"
    if name.startswith("embedding."):
        return "embedding"
    return "head" if name.startswith("output_layer.") else "layers"
