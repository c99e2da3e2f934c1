"""Buckets broadcast over TCP by gloo."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_mega.weight_transfer.broadcast import ENDED, GroupInbox, GroupOutbox, from_first
from tulu_mega.weight_transfer.transports import Transport


class Gloo(Transport):
    """A broadcast to each server's workers, from and to memory on the CPU; between any hosts."""

    name = "gloo"
    device = "cpu"
    same_host = False
    mapped = False
    automatic = True

    @staticmethod
    def outbox(capacity: int, device: torch.device, timeout_s: float) -> GroupOutbox:
        return GroupOutbox("gloo", _group, capacity, torch.device("cpu"), timeout_s)

    @staticmethod
    def inbox(endpoint: Mapping[str, Any], worker: int, device: torch.device, timeout_s: float) -> GroupInbox:
        return GroupInbox(endpoint, _group, worker, torch.device("cpu"), timeout_s)


def _group(store: dist.Store, rank: int, size: int, device: torch.device, address: str, timeout_s: float) -> GlooGroup:
    return GlooGroup(store, rank, size, address, timeout_s)


class GlooGroup:
    """Bound to an address that the others reach: GLOO_SOCKET_IFNAME is about the trainer's ranks, which may be on one host. All
    have met when it is made."""

    def __init__(self, store: dist.Store, rank: int, size: int, address: str, timeout_s: float):
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = self._timeout = timedelta(seconds=timeout_s)
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, options)

    def meet(self) -> None:
        pass

    def broadcast(self, data: Tensor) -> None:
        group = self._group
        if group is None:
            raise RuntimeError(ENDED)
        try:
            group.broadcast([data], from_first(self._timeout)).wait()
        except RuntimeError:
            self.abort()
            raise

    def abort(self) -> None:
        self._group = None
