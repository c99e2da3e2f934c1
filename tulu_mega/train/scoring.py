"""Packing of sequences that every rank has, and scoring of them, with the results on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor
from transformers import PretrainedConfig

from tulu_mega.data.batch import pack
from tulu_mega.data.packing import plan_step
from tulu_mega.distributed.collectives import gathered_at_lead
from tulu_mega.layout.cost import Cost, sequence_flops
from tulu_mega.layout.flops import head_columns
from tulu_mega.layout.packing_rules import pack_alignment, pipeline_of
from tulu_mega.records import PackedBatch, TokenizedRow
from tulu_mega.train.engine import Engine

R = TypeVar("R")


def flops_of(hf: PretrainedConfig) -> Cost:
    """Return the cost of a sequence, a function of its length, by the model's Hugging Face config."""
    return sequence_flops(hf.hidden_size, hf.intermediate_size, hf.num_hidden_layers, head_columns(hf.to_dict()))


def packed_share(engine: Engine, sequences: Sequence[TokenizedRow], capacity: int) -> list[PackedBatch]:
    """Pack sequences that every rank has, and return this data-parallel rank's micro-batches. Ranks get about equal work.

    Args:
        capacity: tokens a packed micro-batch may hold (a longer sequence has one of its own).
    """
    place = engine.topology
    align, pipeline = pack_alignment(engine.settings), pipeline_of(engine.hf.to_dict(), engine.settings)
    lengths, cost = [len(sequence.input_ids) for sequence in sequences], flops_of(engine.hf)
    plan = plan_step(lengths, place.data, capacity, align, cost=cost, multiple=pipeline.multiple, pipeline=pipeline)
    return [pack((sequences[index] for index in bin_), align) for bin_ in plan[place.data_rank]]


def score_rows(
    engine: Engine, sequences: Sequence[TokenizedRow], capacity: int, read: Callable[[PackedBatch, Tensor], dict[int, R]]
) -> dict[int, R]:
    """Score sequences, dealt out evenly over the data-parallel ranks. Every rank calls it with the same sequences.

    Args:
        sequences: each with a ``row`` of its own.
        capacity: tokens a packed micro-batch may hold (a longer sequence has one of its own).
        read: what is kept of a micro-batch and its [T] output, by row.

    Returns:
        By row on rank 0; nothing elsewhere.
    """
    place = engine.topology
    micro_batches = packed_share(engine, sequences, capacity)
    scored = engine.score(micro_batches)
    mine: dict[int, R] = {}
    if place.reports_loss and place.context_rank == 0:
        for batch, output_T in zip(micro_batches, scored, strict=True):
            mine |= read(batch, output_T.cpu())
    return {row: value for part in gathered_at_lead(mine) for row, value in part.items()}
