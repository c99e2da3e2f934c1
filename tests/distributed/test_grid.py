"""Who is where among the ranks, and who holds copies."""

from __future__ import annotations

from itertools import product

import pytest

from tests.lib import world
from tulu_mega.config import ParallelSettings
from tulu_mega.distributed.grid import ShardGrid

pytestmark = pytest.mark.ranks

GRIDS = [ShardGrid(tensor=2, pipeline=3, virtual=2, context=2, data=4), ShardGrid(tensor=4), ShardGrid(context=3, data=2)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_places_number_the_ranks(grid):
    places = set()
    for rank in range(grid.world):
        here = ShardGrid(**grid.sizes, rank=rank)
        places.add((here.tensor_rank, here.context_rank, here.data_rank, here.pipeline_rank))
        assert here.at() == here == grid.at(tensor_rank=here.tensor_rank, pipeline_rank=here.pipeline_rank, copy=here.copy)
        assert [each.tensor_rank for each in here.tensor_peers()] == list(range(grid.tensor))
        assert {(each.copy, each.pipeline_rank) for each in here.tensor_peers()} == {(here.copy, here.pipeline_rank)}
    assert places == set(product(range(grid.tensor), range(grid.context), range(grid.data), range(grid.pipeline)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_first_copy_holds_the_model_once(grid):
    ranks = [ShardGrid(**grid.sizes, rank=rank) for rank in range(grid.world)]
    first = [each for each in ranks if each.first_copy]
    assert all(each.data_rank == each.context_rank == 0 for each in first)
    assert len(first) == grid.tensor * grid.pipeline == grid.world // grid.copies
    givers = [each for each in ranks if each.gives_whole_tensors]
    assert [each.pipeline_rank for each in givers] == list(range(grid.pipeline))
    assert sorted(stage for each in givers for stage in each.stages) == list(range(grid.pipeline * grid.virtual))


def test_neighbours_share_a_tensor_group_and_stages_are_far_apart():
    """As megatron-core numbers its ranks: tensor, context, data, pipeline."""
    here = ShardGrid(tensor=2, pipeline=2, context=2, data=2, rank=0b1011)
    assert (here.tensor_rank, here.context_rank, here.data_rank, here.pipeline_rank) == (1, 1, 0, 1)
    assert here.copy == 1 and here.at(copy=2).rank == 0b1101


def places(layout: dict[str, int]) -> tuple[list[tuple[int, ...]], bool]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    from tulu_mega.distributed import topology
    from tulu_mega.platforms import install

    here = topology.start(ParallelSettings(**layout), install(), seed=1)
    theirs = (
        parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(), parallel_state.get_data_parallel_rank(),
    )  # fmt: skip
    ours = (here.tensor_rank, here.pipeline_rank, here.context_rank, here.data_rank)
    return [ours, theirs], here.copy == dist.get_rank(here.data_context_group)


@pytest.mark.parametrize("layout", [{"tensor": 2, "context": 2}, {"pipeline": 2, "data": 2}, {"context": 2, "data": 2}])
def test_the_grid_is_megatron_cores(layout):
    for (ours, theirs), same_copy in world.run(4, places, layout):
        assert ours == theirs and same_copy
