"""The simulated order of passes is the one megatron-core's schedules run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.lib import world
from tulu_mega.layout.schedule import _rank_order

pytestmark = pytest.mark.ranks


def megatron_order(rank: int, ranks: int, chunks: int, count: int) -> list[tuple[int, int, int]]:
    """From megatron-core's own table and number of warm-up passes."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    group = SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
    sizes = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None)
    total, _all, ahead, remaining = get_pp_rank_microbatches(count, chunks, ranks, p2p_communicator=sizes)
    table = get_schedule_table(count, chunks, ranks)

    def forward(k):
        return table[k][0], table[k][1] * ranks + rank, 0

    def backward(k):
        return table[k][0], (chunks - 1 - table[k][1]) * ranks + rank, 1

    order = [forward(k) for k in range(ahead)]
    for k in range(remaining):
        order += [forward(k + ahead), backward(k)]
    return order + [backward(k) for k in range(remaining, total)]


def differing() -> list[tuple[int, ...]]:
    cases = [(ranks, chunks, n * ranks) for ranks in (2, 3, 4, 8) for chunks in (1, 2, 3) for n in (1, 2, 3)]
    cases += [(4, 1, 3), (4, 1, 7)]
    return [(rank, *case) for case in cases for rank in range(case[0]) if _rank_order(rank, *case) != megatron_order(rank, *case)]


def test_every_rank_runs_its_passes_in_megatrons_order():
    assert world.run(1, differing) == [[]]
