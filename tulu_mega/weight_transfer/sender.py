"""A rank of a trainer as weight transfer sees it: its part of the weights, and whether it sends to servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tulu_mega.bridge.stream import LiveWeights
from tulu_mega.weight_transfer.counterpart import Model
from tulu_mega.weight_transfer.protocol import Bucket, Manifest, plan_buckets

_SMALL_BUCKET = 16 * 2**20
_BUCKETS = 5
"""A model of fewer bytes than this many of the largest buckets gets smaller buckets, so that filling and loading overlap."""


@dataclass(frozen=True)
class Apart:
    """What a rank brings beside where low-rank adapters may travel without the weights that they are for."""

    config: Mapping[str, Any]
    """The content of their adapter_config.json."""
    adapters: LiveWeights | None
    """This rank's part of them; None on ranks that hold copies of another rank's."""
    base: str
    """`base.identity` of the weights that they are for; on rank 0 alone."""
    weights: LiveWeights | None
    """This rank's part of these, for servers that have others."""


@dataclass(frozen=True)
class Sender:
    """What one rank brings to a transfer; every rank of the trainer has one."""

    model: Model
    """What servers are to have."""
    weights: LiveWeights | None
    """This rank's part of the model; None on ranks that hold copies of another rank's."""
    sends: bool
    """Whether this rank has whole tensors for servers: the first tensor rank of each pipeline stage."""
    pipeline_rank: int
    device: torch.device
    at: Callable[[str], None]
    """Reports progress and what begins; see `watchdog.Watchdog.at`."""
    settle: Callable[[], None]
    """Waits until the parameters are those of the last update."""
    apart: Apart | None = None
    """Of a model with adapters that servers may hold apart. `weights` has them merged."""


def stream_dtype(model: str, servers: str) -> torch.dtype:
    """The type of the tensors that travel: no more bits than either end has.

    Args:
        model, servers: `model.dtype` and `rollout.dtype`.
    """
    return torch.bfloat16 if "bf16" in (model, servers) else torch.float32


def sender_buckets(sender: int, names: Sequence[str], manifest: Manifest, limit: int) -> list[Bucket]:
    """The buckets in which a sender's tensors travel, in their order.

    Args:
        limit: bytes (`rollout.bucket_mib`); small models have smaller buckets.
    """
    limit = min(limit, max(_SMALL_BUCKET, sum(manifest[name].nbytes for name in names) // _BUCKETS))
    return plan_buckets(sender, names, manifest, limit)
