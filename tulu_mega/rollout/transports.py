"""How a bucket's bytes get from a sender to the workers: an outbox on the trainer's side, an inbox on the worker's.

    shm    memory of the sender that the workers map; one host
    gloo   broadcast over TCP; any hosts
    nccl   the same between GPUs (not run on a GPU yet)
    ipc    a sender's GPU memory that the workers map; one host (not run on a GPU yet)

One outbox serves all servers. With mapped memory each byte is written once, whatever their number.
"""

from __future__ import annotations

import base64
import contextlib
import mmap
import os
import socket
import uuid
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_mega.rollout.protocol import SLOTS

Endpoint = dict[str, Any]
"""What an inbox needs to know of an outbox, as JSON."""


class Outbox(Protocol):
    """A sender's buffers, `SLOTS` of them."""

    mapped: bool
    """whether workers read the buffers themselves, once these are filled; else `deliver` and they meet"""

    def buffer(self, slot: int) -> Tensor:
        """Bytes to fill, uint8."""
        ...

    def endpoint(self, url: str, workers: int) -> Endpoint:
        """Opens a way to one more server and says how its workers attach.

        Args:
            workers: that the server has.
        """
        ...

    def connect(self, url: str) -> None:
        """Waits until the server's workers, which were given the endpoint meanwhile, are attached."""
        ...

    def deliver(self, url: str, slot: int, nbytes: int) -> None:
        """Sends a filled buffer's first bytes to a server's workers, who have been told to receive them."""
        ...

    def close(self) -> None: ...


class Inbox(Protocol):
    """A worker's end of one sender's outbox."""

    def receive(self, slot: int, nbytes: int) -> Tensor:
        """The bytes, uint8; valid until the bucket is acknowledged."""
        ...

    def close(self) -> None: ...


def outbox(kind: str, capacity: int, device: torch.device, timeout_s: float) -> Outbox:
    """
    Args:
        kind: shm, gloo, nccl or ipc.
        capacity: bytes of a buffer.
        device: of the sender.
        timeout_s: of whatever waits for the other end.
    """
    if kind == "shm":
        return _SharedOutbox(capacity)
    if kind == "ipc":
        return _IpcOutbox(capacity, device)
    return _GroupOutbox(kind, capacity, device if kind == "nccl" else torch.device("cpu"), timeout_s)


def inbox(endpoint: Mapping[str, Any], worker: int, device: torch.device, timeout_s: float) -> Inbox:
    """
    Args:
        endpoint: the sender's.
        worker: this worker's rank in its server.
        device: of the worker.
    """
    kind = endpoint["kind"]
    if kind == "shm":
        return _SharedInbox(endpoint)
    if kind == "ipc":
        return _IpcInbox(endpoint, worker, device)
    return _GroupInbox(endpoint, worker, device if kind == "nccl" else torch.device("cpu"), timeout_s)


class _SharedOutbox:
    """Memory without a name: it is gone with the last process that has it open, however that ends, and no quota of /dev/shm
    (64 MiB in a container) applies. Others of the same user open it through /proc."""

    mapped = True

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

    def deliver(self, url: str, slot: int, nbytes: int) -> None:
        pass

    def close(self) -> None:
        del self._whole
        with contextlib.suppress(BufferError):  # somebody still reads a view: the memory goes with it
            self._memory.close()
        os.close(self._descriptor)


class _SharedInbox:
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


class _GroupOutbox:
    """A process group of its own for each server: the sender is rank 0, the workers follow."""

    mapped = False

    def __init__(self, kind: str, capacity: int, device: torch.device, timeout_s: float):
        self._kind, self._timeout = kind, timedelta(seconds=timeout_s)
        self._buffers = [torch.empty(capacity, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._stores: dict[str, tuple[dist.TCPStore, str, int]] = {}
        self._groups: dict[str, Any] = {}

    def buffer(self, slot: int) -> Tensor:
        return self._buffers[slot]

    def endpoint(self, url: str, workers: int) -> Endpoint:
        host, name = _address_towards(url), uuid.uuid4().hex
        store = dist.TCPStore(host, 0, is_master=True, timeout=self._timeout, wait_for_workers=False)
        self._stores[url] = store, name, workers + 1
        return {"kind": self._kind, "host": host, "port": store.port, "name": name, "size": workers + 1}

    def connect(self, url: str) -> None:
        store, name, size = self._stores[url]
        self._groups[url] = _group(self._kind, dist.PrefixStore(name, store), 0, size, self._timeout)

    def deliver(self, url: str, slot: int, nbytes: int) -> None:
        _broadcast(self._groups[url], self._buffers[slot][:nbytes], self._timeout)

    def close(self) -> None:
        self._groups.clear()
        self._stores.clear()


class _GroupInbox:
    def __init__(self, endpoint: Mapping[str, Any], worker: int, device: torch.device, timeout_s: float):
        timeout = timedelta(seconds=timeout_s)
        self._timeout, self._device = timeout, device
        self._store = dist.TCPStore(endpoint["host"], endpoint["port"], is_master=False, timeout=timeout, wait_for_workers=False)
        prefixed = dist.PrefixStore(endpoint["name"], self._store)
        self._group = _group(endpoint["kind"], prefixed, 1 + worker, endpoint["size"], timeout)
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def receive(self, slot: int, nbytes: int) -> Tensor:
        if len(self._buffer) < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        _broadcast(self._group, self._buffer[:nbytes], self._timeout)
        return self._buffer[:nbytes]

    def close(self) -> None:
        self._group = self._store = None


def _group(kind: str, store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """A process group beside, and unknown to, the ones that trainer and vLLM have."""
    if kind == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _broadcast(group: Any, data: Tensor, timeout: timedelta) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor, options.timeout = 0, 0, timeout
    group.broadcast([data], options).wait()
    if data.is_cuda:
        torch.cuda.current_stream(data.device).synchronize()


class _IpcOutbox:
    """Not run on a GPU yet."""

    mapped = True

    def __init__(self, capacity: int, device: torch.device):
        self._buffers = [torch.empty(capacity, dtype=torch.uint8, device=device) for _ in range(SLOTS)]

    def buffer(self, slot: int) -> Tensor:
        return self._buffers[slot]

    def endpoint(self, url: str, workers: int) -> Endpoint:
        # An export for each worker: CUDA counts the openings of each by itself.
        handles = [[_exported(buffer) for buffer in self._buffers] for _ in range(workers)]
        return {"kind": "ipc", "handles": handles}

    def connect(self, url: str) -> None:
        pass

    def deliver(self, url: str, slot: int, nbytes: int) -> None:
        torch.cuda.current_stream(self._buffers[slot].device).synchronize()

    def close(self) -> None:
        self._buffers.clear()


class _IpcInbox:
    """Not run on a GPU yet."""

    def __init__(self, endpoint: Mapping[str, Any], worker: int, device: torch.device):
        self._buffers = [_imported(handle, device) for handle in endpoint["handles"][worker]]

    def receive(self, slot: int, nbytes: int) -> Tensor:
        return self._buffers[slot][:nbytes]

    def close(self) -> None:
        self._buffers.clear()


def _exported(buffer: Tensor) -> list[Any]:
    """A CUDA IPC handle as JSON: torch's own tuple, its bytes in base64."""
    shared = buffer.untyped_storage()._share_cuda_()
    return [{"bytes": base64.b64encode(each).decode()} if isinstance(each, bytes) else each for each in shared]


def _imported(handle: list[Any], device: torch.device) -> Tensor:
    shared = [base64.b64decode(each["bytes"]) if isinstance(each, dict) else each for each in handle]
    shared[0] = device.index  # the worker's name of the device the memory is mapped on
    storage = torch.UntypedStorage._new_shared_cuda(*shared)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def is_local(url: str) -> bool:
    """Whether a server's address is one of this host's own."""
    try:
        return _address_towards(url) == socket.gethostbyname(urlsplit(url).hostname or "")
    except OSError:
        return False


def _address_towards(url: str) -> str:
    """The address of this host that a server sees it under: packets to it would leave from there. None are sent."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]
