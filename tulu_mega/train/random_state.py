"""The random states of a run's ranks in a checkpoint, from which dropout draws.

Data-parallel ranks begin alike and part with the first sequence that is longer on one than on the other, so every rank keeps its
own. They belong to the layout they were drawn under. Under another one there is nothing that an undisturbed run would have drawn:
the ranks draw anew, from the seed and the step, and never again what the run began with.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from tulu_mega.distributed.topology import Topology

Kept = Literal["every rank's", "first copy's"]
"""Whose states a checkpoint has: those of every rank, or, in older ones, one for all ranks that hold the same weights."""


def held_state(place: Topology, device: torch.device, kept: Kept) -> ShardedObject:
    """This rank's random states as megatron-core saves them, and where it finds those of a checkpoint.

    Args:
        place: of this rank.
        device: whose state is part of it, beside the CPU's.
        kept: whose states the checkpoint has.
    """
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    shape, at = (place.pipeline, place.tensor), (place.pipeline_rank, place.tensor_rank)
    if kept == "first copy's":
        return ShardedObject("rng", states, shape, at, replica_id=place.copy)
    return ShardedObject("rng_by_rank", states, (*shape, place.copies), (*at, place.copy), replica_id=0)


def put_back(states: dict[str, Any], device: torch.device) -> None:
    """Set this rank's random states to those of a checkpoint."""
    torch.set_rng_state(states["cpu"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])
