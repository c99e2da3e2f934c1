"""A sender's GPU memory, mapped by the workers of its host. Not run on a GPU yet."""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tulu_mega.weight_transfer.protocol import SLOTS
from tulu_mega.weight_transfer.transports import Endpoint, Transport
from tulu_mega.weight_transfer.waiting import FillEvents


class CudaIpc(Transport):
    """Shared memory of a GPU. Not run on a GPU yet."""

    name = "ipc"
    device = "cuda"
    same_host = True
    mapped = True
    automatic = True

    @staticmethod
    def outbox(capacity: int, device: torch.device, timeout_s: float) -> IpcOutbox:
        return IpcOutbox(capacity, device)

    @staticmethod
    def inbox(endpoint: Mapping[str, Any], worker: int, device: torch.device, timeout_s: float) -> IpcInbox:
        return IpcInbox(endpoint, worker, device)


class IpcOutbox:
    """Buffers in the sender's GPU memory. Not run on a GPU yet."""

    def __init__(self, capacity: int, device: torch.device):
        self._device = device
        self._buffers = _shared_buffers(capacity, device)
        self._fills = FillEvents(device)

    def buffer(self, slot: int) -> Tensor:
        return self._buffers[slot]

    def endpoint(self, url: str, workers: int) -> Endpoint:
        # An export for each worker: CUDA counts the openings of each by itself.
        handles = [[_exported(buffer) for buffer in self._buffers] for _ in range(workers)]
        return {"kind": "ipc", "handles": handles}

    def connect(self, url: str) -> None:
        pass

    def filled(self, slot: int) -> None:
        self._fills.note(slot)

    def deliver(self, url: str, slot: int, nbytes: int) -> None:
        self._fills.wait(slot)

    def drop(self, url: str) -> None:
        pass

    def close(self) -> None:
        self._buffers = []


class IpcInbox:
    """The sender's buffers, mapped. Not run on a GPU yet."""

    def __init__(self, endpoint: Mapping[str, Any], worker: int, device: torch.device):
        self._buffers = [_imported(handle, device) for handle in endpoint["handles"][worker]]

    def receive(self, slot: int, nbytes: int) -> Tensor:
        return self._buffers[slot][:nbytes]

    def close(self) -> None:
        self._buffers.clear()


_SHARED: dict[torch.device, list[Tensor]] = {}
"""Buffers that other processes have opened. torch keeps such memory until each of them has released it, and a killed process
never does. So a process makes the buffers once, and all its outboxes share them."""


def _shared_buffers(capacity: int, device: torch.device) -> list[Tensor]:
    """Of at least so many bytes each."""
    buffers = _SHARED.get(device)
    if buffers is None or len(buffers[0]) < capacity:
        with _plain_segments():
            buffers = [torch.empty(capacity, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        _SHARED[device] = buffers
    return buffers


@contextlib.contextmanager
def _plain_segments() -> Iterator[None]:
    """Outside of expandable segments: other processes open these through pidfd_getfd, which Linux refuses them unless they are
    descendants (Yama). What is set takes the place of all that was, so that the whole of it is written again."""
    settings = torch._C._accelerator_getAllocatorSettings()
    plain = re.sub(r"(expandable_segments\s*:\s*)True", r"\1False", settings)
    if plain == settings:
        yield
        return
    torch._C._accelerator_setAllocatorSettings(plain)
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(settings)


def _exported(buffer: Tensor) -> list[Any]:
    """A CUDA IPC handle as JSON: torch's own tuple, its bytes in base64."""
    shared = buffer.untyped_storage()._share_cuda_()
    return [{"bytes": base64.b64encode(each).decode()} if isinstance(each, bytes) else each for each in shared]


def _imported(handle: list[Any], device: torch.device) -> Tensor:
    shared = [base64.b64decode(each["bytes"]) if isinstance(each, dict) else each for each in handle]
    shared[0] = device.index  # the worker's name of the device the memory is mapped on
    shared[7] = False  # no event to wait for, which may be another GPU's: whoever tells of a bucket has waited until it is full
    storage = torch.UntypedStorage._new_shared_cuda(*shared)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
