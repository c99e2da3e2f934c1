"""Buckets broadcast to each server's workers, over TCP (gloo) or between GPUs (NCCL)."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_mega.weight_transfer.protocol import SLOTS
from tulu_mega.weight_transfer.transports.ends import Endpoint
from tulu_mega.weight_transfer.transports.fills import Fills
from tulu_mega.weight_transfer.transports.groups import Group, group_of
from tulu_mega.weight_transfer.transports.routes import address_towards, source_address


class GroupOutbox:
    """A process group of its own for each server: the sender is rank 0, the workers follow."""

    mapped = False

    def __init__(self, kind: str, capacity: int, device: torch.device, timeout_s: float):
        self._kind, self._device, self._timeout = kind, device, timeout_s
        self._buffers = [torch.empty(capacity, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._fills = Fills(device)
        self._stores: dict[str, tuple[dist.TCPStore, str, str, int]] = {}
        """of each server: where it meets this process, at which address, under which name, and how many meet"""
        self._groups: dict[str, Group] = {}

    def buffer(self, slot: int) -> Tensor:
        return self._buffers[slot]

    def endpoint(self, url: str, workers: int) -> Endpoint:
        host, name = address_towards(url), uuid.uuid4().hex
        # torch's store listens on every interface unless it is handed a socket, and asks nobody for a key
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            timeout=timedelta(seconds=self._timeout),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self._stores[url] = store, host, name, workers + 1
        return {"kind": self._kind, "host": host, "port": port, "name": name, "size": workers + 1}

    def connect(self, url: str) -> None:
        store, own, name, size = self._stores[url]
        group = group_of(self._kind, dist.PrefixStore(name, store), 0, size, self._device, own, self._timeout)
        self._groups[url] = group
        group.meet()

    def filled(self, slot: int) -> None:
        self._fills.note(slot)

    def deliver(self, url: str, slot: int, nbytes: int) -> None:
        self._fills.wait(slot)
        self._groups[url].broadcast(self._buffers[slot][:nbytes])

    def drop(self, url: str) -> None:
        self._groups[url].abort()

    def close(self) -> None:
        for group in self._groups.values():
            group.abort()
        self._groups.clear()
        self._stores.clear()


class GroupInbox:
    def __init__(self, endpoint: Mapping[str, Any], worker: int, device: torch.device, timeout_s: float):
        host, port, timeout = endpoint["host"], endpoint["port"], timedelta(seconds=timeout_s)
        self._device = device
        self._store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        prefixed = dist.PrefixStore(endpoint["name"], self._store)
        own = source_address(host, port)
        self._group = group_of(endpoint["kind"], prefixed, 1 + worker, endpoint["size"], device, own, timeout_s)
        self._group.meet()
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def receive(self, slot: int, nbytes: int) -> Tensor:
        if len(self._buffer) < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        if self._device.type == "cuda":  # whoever had this memory before may still read it
            torch.cuda.current_stream(self._device).synchronize()
        self._group.broadcast(self._buffer[:nbytes])
        return self._buffer[:nbytes]

    def close(self) -> None:
        self._group.abort()
        self._group = self._store = None
