"""A rank of a trainer as weight transfer knows it: its part of the weights, and whether it speaks to servers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tulu_mega.bridge.stream import LiveWeights


@dataclass(frozen=True)
class Sender:
    """What one rank brings to a transfer; every rank of the trainer has one."""

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
