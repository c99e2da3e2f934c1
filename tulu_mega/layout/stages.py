"""The numbers of layers on the pipeline stages.

Stage s of R ranks with C chunks each (s from 0 to R x C - 1, in the model's order) lives on rank s mod R. The first stage holds
the embedding too, which costs memory but no time, the last one the output head, which costs both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulu_mega.config import ParallelSettings
from tulu_mega.errors import UserError
from tulu_mega.layout.flops import head_columns, matmul_parameters


def stage_layers(config: Mapping[str, Any], parallel: ParallelSettings) -> tuple[int, ...]:
    """Layers of every stage of a model under a layout.

    Args:
        config: Hugging Face's config.json.

    Raises:
        UserError: as :func:`split_layers`.
    """
    layers = config["num_hidden_layers"]
    head = config["hidden_size"] * head_columns(config)
    return split_layers(
        layers,
        parallel.pipeline,
        parallel.virtual_pipeline,
        first=parallel.first_stage_layers,
        last=parallel.last_stage_layers,
        head=layers * head / (matmul_parameters(config) - head),
    )


def split_layers(
    layers: int, ranks: int, chunks: int = 1, *, first: int | None = None, last: int | None = None, head: float = 0.0
) -> tuple[int, ...]:
    """Split layers over ranks and chunks as evenly as possible: the slowest rank gets as few as possible, each chunk at least
    one.

    Ranks are levelled first, then the chunks of each. Of equals, the later takes the layer: earlier stages hold the embedding and
    the activations of more micro-batches.

    Args:
        layers: of the model.
        ranks, chunks: pipeline parallel size and chunks on each rank.
        first, last: layers of the first and last rank over all chunks, where they are decided already.
        head: cost of the output head in layers.

    Raises:
        UserError: when there is no such split.
    """
    stages = ranks * chunks
    given = {rank: count for rank, count in ((0, first), (ranks - 1, last)) if count is not None}
    counts = [given[stage % ranks] // chunks if stage % ranks in given else 1 for stage in range(stages)]
    free = [stage for stage in range(stages) if stage % ranks not in given]
    rest = layers - sum(counts)
    if rest < 0 or (rest and not free):
        decided = [f"parallel.{name}_stage_layers = {count}" for name, count in (("first", first), ("last", last)) if count]
        raise UserError(
            f"the model's num_hidden_layers = {layers} cannot be split over parallel.pipeline = {ranks} x "
            f"parallel.virtual_pipeline = {chunks} stages{' with ' + ' and '.join(decided) if decided else ''}: "
            + ("every stage needs one; choose fewer stages" if free else f"these are {sum(counts)}; leave one of them out")
        )
    each, over = divmod(rest, len(free)) if free else (0, 0)
    if not over:
        for stage in free:
            counts[stage] += each
        return tuple(counts)

    loads = [sum(counts[rank::ranks]) + (head if rank == ranks - 1 else 0.0) for rank in range(ranks)]
    for _ in range(rest):
        stage = min(free, key=lambda s: (loads[s % ranks], counts[s] + (head if s == stages - 1 else 0.0), -s))
        counts[stage] += 1
        loads[stage % ranks] += 1
    return tuple(counts)
