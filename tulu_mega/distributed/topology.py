"""The place of this process in the grid of parallel ranks. No other module uses megatron-core's parallel_state."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import ParamSpec, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from tulu_mega.config import ParallelSettings
from tulu_mega.distributed.grid import ShardGrid
from tulu_mega.errors import UserError
from tulu_mega.platforms import Platform
from tulu_mega.platforms.group_sets import GroupSet, GroupSets

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Topology(ShardGrid):
    """The grid seen from this process, and the process groups that span its axes."""

    def __str__(self) -> str:
        chunks = f"·VPP{self.virtual}" if self.virtual > 1 else ""
        return f"TP{self.tensor}·PP{self.pipeline}{chunks}·CP{self.context}·DP{self.data} rank {self.rank}"

    @property
    def size(self) -> int:
        """Processes in the world."""
        return self.world

    @property
    def first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    @property
    def reports_loss(self) -> bool:
        """Whether this rank's loss counts: the first tensor rank of the last pipeline stage. The losses of these ranks
        add up to the whole; each context rank has its share."""
        return self.last_stage and self.tensor_rank == 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This layout's groups are megatron-core's for a while, where another layout's were."""
        known = _known.get(tuple(self.sizes.values()))
        with _sets[0].in_place(known) if known else contextlib.nullcontext():
            yield

    @property
    def tensor_group(self) -> ProcessGroup:
        with self.entered():
            return parallel_state.get_tensor_model_parallel_group()

    @property
    def pipeline_group(self) -> ProcessGroup:
        with self.entered():
            return parallel_state.get_pipeline_model_parallel_group()

    @property
    def context_group(self) -> ProcessGroup:
        with self.entered():
            return parallel_state.get_context_parallel_group()

    @property
    def data_context_group(self) -> ProcessGroup:
        """The ranks gradients are summed over: DP x CP."""
        with self.entered():
            return parallel_state.get_data_parallel_group(with_context_parallel=True)


_sets: list[GroupSets] = []
"""The process's sets of groups, once there are any."""
_known: dict[tuple[int, ...], GroupSet] = {}
"""Each layout's, by its sizes: equal layouts share groups."""


def in_its_layout(work: Callable[P, T]) -> Callable[P, T]:
    """The same, done while the layout of the first argument, which has a `topology`, is entered."""

    @functools.wraps(work)
    def inside(*args: P.args, **named: P.kwargs) -> T:
        with args[0].topology.entered():
            return work(*args, **named)

    return inside


def start(parallel: ParallelSettings, platform: Platform, seed: int, timeout: timedelta = timedelta(minutes=30)) -> Topology:
    """Joins the world that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe and builds its parallel groups.

    Args:
        seed: of megatron-core's random states, which differ between tensor ranks where they must.
        timeout: of every collective, in whatever group; groups but the world's have it in whole minutes, rounded up.

    Raises:
        UserError: when the layout does not fit the world, or torchrun has started ranks again that could not meet.
    """
    if not dist.is_initialized():
        _check_store()
        if platform.backend == "nccl":
            # torch would have init_process_group told the device, but then makes a communicator for each group at once, and a
            # pipeline's messages wait for one another; the current device is this process's already
            warnings.filterwarnings("ignore", r"barrier\(\): using the device under current context")
        # entries of the flight recorder, for whoever looks into a hang: under NCCL a step of a pipeline has hundreds
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000" if platform.backend == "nccl" else "256")
        dist.init_process_group(platform.backend, timeout=timeout)
    here = _place(parallel)
    _build(parallel, platform, timeout)
    seed_ranks(seed)
    _sets.append(GroupSets(parallel_state))
    _known[tuple(here.sizes.values())] = _sets[0].first
    _check_order(here)
    return here


def another(parallel: ParallelSettings, platform: Platform, timeout: timedelta = timedelta(minutes=30)) -> Topology:
    """Builds the groups of a further layout over the same world, unless a layout of its sizes has them; a collective. They are
    megatron-core's only where the layout is :meth:`Topology.entered`; random states stay the first layout's.

    Args:
        timeout: as for :func:`start`.

    Raises:
        UserError: the layout does not fit the world.
    """
    here = _place(parallel)
    key = tuple(here.sizes.values())
    if key not in _known:
        _known[key] = _sets[0].another(lambda: _build(parallel, platform, timeout))
    with here.entered():
        _check_order(here)
    return here


def _place(parallel: ParallelSettings) -> Topology:
    """This process in a layout. Raises UserError where the layout does not fit the world."""
    return Topology(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline,
        context=parallel.context,
        data=parallel.replicas(dist.get_world_size()),
        rank=dist.get_rank(),
    )


def _build(parallel: ParallelSettings, platform: Platform, timeout: timedelta) -> None:
    """Makes megatron-core's groups. Arguments as for :func:`start`."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
        create_gloo_process_groups=platform.backend == "nccl",  # where gloo carries everything the groups serve as they are
    )


def seed_ranks(seed: int, step: int = 0) -> None:
    """Sets every random state, megatron-core's among them, which differ between tensor ranks where they must.

    Args:
        seed: of the run.
        step: steps done; each number of steps gives other random states.
    """
    tensor_parallel.model_parallel_cuda_manual_seed((seed + 1_000_003 * step) % 2**31 if step else seed)


def _check_order(here: Topology) -> None:
    """Compares megatron-core's numbering of the ranks with the grid's.

    Raises:
        RuntimeError: the two numberings differ, so that the grid would name the wrong weights for this rank.
    """
    ours = (here.tensor_rank, here.pipeline_rank, here.context_rank, here.data_rank)
    theirs = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    if ours != theirs:
        raise RuntimeError(
            f"{here}: (TP, PP, CP, DP) ranks are {theirs} for megatron-core, {ours} in the grid; correct distributed.grid.AXES"
        )


def _check_store() -> None:
    """Refuse a store that torchrun kept from earlier ranks: restarted ranks would find the addresses of dead ones in it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise UserError(
            "torchrun restarted the ranks with the store of the earlier ranks, in which the new ones cannot meet; start torchrun "
            "as python -m tulu_mega.agent, or with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )


def stop() -> None:
    """Leaves the groups and the world."""
    _known.clear()
    _sets.clear()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def groups() -> dict[str, tuple[int, ...]]:
    """The ranks of every process group that this rank is in, by the group's name."""
    known = dist.distributed_c10d._world.pg_group_ranks  # torch lists them nowhere else
    return {group.group_name: tuple(sorted(ranks)) for group, ranks in known.items() if isinstance(group, ProcessGroup)}


def recorded_collectives() -> bytes:
    """Return torch's flight recorder as JSON: this rank's last collectives. NCCL has a recorder of its own."""
    from torch._C import _distributed_c10d as c10d

    own = getattr(c10d, "_dump_nccl_trace_json", None) if dist.get_backend() == "nccl" else None
    return (own or c10d._dump_fr_trace_json)()


def store() -> dist.Store:
    """Return a new connection to the store through which the ranks met."""
    return dist.distributed_c10d._get_default_store().clone()
