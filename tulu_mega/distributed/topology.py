"""The place of this process in the grid of parallel ranks. No other module uses megatron-core's parallel_state."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from tulu_mega.config import ParallelSettings
from tulu_mega.distributed.grid import ShardGrid
from tulu_mega.errors import UserError
from tulu_mega.platforms import Platform


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

    @property
    def tensor_group(self) -> ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def pipeline_group(self) -> ProcessGroup:
        return parallel_state.get_pipeline_model_parallel_group()

    @property
    def context_group(self) -> ProcessGroup:
        return parallel_state.get_context_parallel_group()

    @property
    def data_context_group(self) -> ProcessGroup:
        """The ranks gradients are summed over: DP x CP."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)


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
    data = parallel.replicas(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
        create_gloo_process_groups=platform.backend == "nccl",  # where gloo carries everything the groups serve as they are
    )
    seed_ranks(seed)
    here = Topology(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline,
        context=parallel.context,
        data=data,
        rank=dist.get_rank(),
    )
    _check_order(here)
    return here


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
