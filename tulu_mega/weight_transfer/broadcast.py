"""Broadcasts of buckets to the workers of each server: the common part of the transports gloo and nccl."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_mega.weight_transfer.protocol import SLOTS
from tulu_mega.weight_transfer.server import address_towards, source_address
from tulu_mega.weight_transfer.transports import Endpoint
from tulu_mega.weight_transfer.waiting import FillEvents

ENDED = "the connection was given up after an earlier failure"


class Group(Protocol):
    """A process group of its own, which neither trainer nor vLLM knows. Rank 0 sends. The first failure ends the group."""

    def meet(self) -> None:
        """Waits for the others.

        Raises:
            RuntimeError: not all came within the time-out, or they cannot be a group.
        """
        ...

    def broadcast(self, data: Tensor) -> None:
        """Send or receive a buffer; return when all of it has arrived or is sent.

        Raises:
            RuntimeError: a member is gone, it took longer than the time-out, or the group has ended.
        """
        ...

    def abort(self) -> None:
        """End the group, and every broadcast that is under way."""
        ...


GroupOf = Callable[[dist.Store, int, int, torch.device, str, float], Group]
"""Makes a group: where its members meet, this one's rank, their number, the device of what is sent, this process's own address
towards the others, seconds of each wait."""


class GroupOutbox:
    """The sending end: a process group of its own for each server, in which the sender is rank 0 and the workers follow.

    Args:
        kind: the transport's name.
        group_of: makes a group.
        capacity: bytes of a buffer.
        device: of the buffers.
        timeout_s: seconds that waiting for the others may take.
    """

    def __init__(self, kind: str, group_of: GroupOf, capacity: int, device: torch.device, timeout_s: float):
        self._kind, self._group_of, self._device, self._timeout = kind, group_of, device, timeout_s
        self._buffers = [torch.empty(capacity, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._fills = FillEvents(device)
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
        group = self._group_of(dist.PrefixStore(name, store), 0, size, self._device, own, self._timeout)
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
    """The receiving end: a member of one sender's group; attached once it is made.

    Args:
        endpoint: the sender's.
        group_of: makes a group.
        worker: this worker's rank in its server.
        device: of the buffer.
        timeout_s: seconds that waiting for the others may take.
    """

    def __init__(self, endpoint: Mapping[str, Any], group_of: GroupOf, worker: int, device: torch.device, timeout_s: float):
        host, port, timeout = endpoint["host"], endpoint["port"], timedelta(seconds=timeout_s)
        self._device = device
        self._store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        prefixed = dist.PrefixStore(endpoint["name"], self._store)
        own = source_address(host, port)
        self._group = group_of(prefixed, 1 + worker, endpoint["size"], device, own, timeout_s)
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


def from_first(timeout: timedelta) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor, options.timeout = 0, 0, timeout
    return options
