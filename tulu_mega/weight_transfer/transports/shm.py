"""A sender's memory, mapped by the workers of its host."""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tulu_mega.weight_transfer.protocol import SLOTS
from tulu_mega.weight_transfer.transports import Endpoint, Transport


class SharedMemory(Transport):
    """Shared memory of a host: each byte is written once and read by all workers."""

    name = "shm"
    device = "cpu"
    same_host = True
    mapped = True
    automatic = True

    @staticmethod
    def outbox(capacity: int, device: torch.device, timeout_s: float) -> SharedOutbox:
        return SharedOutbox(capacity)

    @staticmethod
    def inbox(endpoint: Mapping[str, Any], worker: int, device: torch.device, timeout_s: float) -> SharedInbox:
        return SharedInbox(endpoint)


class SharedOutbox:
    """Memory without a name: it is gone with the last process that has it open, however that ends, and no quota of /dev/shm
    (64 MiB in a container) applies. Others of the same user open it through /proc."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._descriptor = os.memfd_create("tulu-mega-weights", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, max(1, capacity * SLOTS))
        self._memory = mmap.mmap(self._descriptor, max(1, capacity * SLOTS))
        self._whole = torch.frombuffer(self._memory, dtype=torch.uint8)

    def buffer(self, slot: int) -> Tensor:
        return self._whole[slot * self._capacity : (slot + 1) * self._capacity]

    def endpoint(self, url: str, workers: int) -> Endpoint:
        file = os.fstat(self._descriptor)
        path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        return {"kind": "shm", "path": path, "inode": file.st_ino, "capacity": self._capacity}

    def connect(self, url: str) -> None:
        pass

    def filled(self, slot: int) -> None:
        pass

    def deliver(self, url: str, slot: int, nbytes: int) -> None:
        pass

    def drop(self, url: str) -> None:
        pass

    def close(self) -> None:
        del self._whole
        with contextlib.suppress(BufferError):  # somebody still reads a view: the memory goes with it
            self._memory.close()
        os.close(self._descriptor)


class SharedInbox:
    """The sender's memory, mapped for reading.

    Raises:
        RuntimeError: it cannot be opened, or is another's by now.
    """

    def __init__(self, endpoint: Mapping[str, Any]):
        self._capacity = endpoint["capacity"]
        try:
            descriptor = os.open(endpoint["path"], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeError(
                f"the sender's memory {endpoint['path']} cannot be opened ({error.strerror}); server and trainer must run on one "
                "host, as one user, in one process namespace: set rollout.transport to gloo where they do not"
            ) from None
        try:
            if os.fstat(descriptor).st_ino != endpoint["inode"]:
                raise RuntimeError(f"{endpoint['path']} is not the sender's memory: it belongs to another process by now")
            self._memory = mmap.mmap(descriptor, max(1, self._capacity * SLOTS), access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")  # nobody writes here
            self._whole = torch.frombuffer(self._memory, dtype=torch.uint8)

    def receive(self, slot: int, nbytes: int) -> Tensor:
        return self._whole[slot * self._capacity : slot * self._capacity + nbytes]

    def close(self) -> None:
        del self._whole
        with contextlib.suppress(BufferError):
            self._memory.close()
