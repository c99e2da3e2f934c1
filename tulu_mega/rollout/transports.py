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
import ipaddress
import mmap
import os
import queue
import re
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_mega.rollout.protocol import SLOTS

Endpoint = dict[str, Any]
"""What an inbox needs to know of an outbox, as JSON."""
ABORT_SECONDS, SLACK_SECONDS = 20.0, 10.0
POLL_SECONDS = 2e-4


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

    def filled(self, slot: int) -> None:
        """Called where a buffer was filled, by the same thread: what was asked of a GPU until now is part of it."""
        ...

    def deliver(self, url: str, slot: int, nbytes: int) -> None:
        """Sends a filled buffer's first bytes to a server's workers, who have been told to receive them.

        Raises:
            RuntimeError: they did not come, or went away; within the time-out.
        """
        ...

    def drop(self, url: str) -> None:
        """Gives a server up: what is under way to it ends."""
        ...

    def close(self) -> None: ...


class Inbox(Protocol):
    """A worker's end of one sender's outbox."""

    def receive(self, slot: int, nbytes: int) -> Tensor:
        """The bytes, uint8; valid until the bucket is acknowledged."""
        ...

    def close(self) -> None: ...


class Helper:
    """A thread that does one thing after the other, any of which may never return: the process's end does not wait for it."""

    def __init__(self):
        self._todo: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="helper", daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._todo.put((work, future))
        return future

    def close(self) -> None:
        """What was submitted is still done."""
        self._todo.put(None)

    def _run(self) -> None:
        while (item := self._todo.get()) is not None:
            work, future = item
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del item, work, future  # or they would be kept until there is more to do


def aside(work: Callable[[], Any]) -> Future:
    """Does a single thing in such a thread."""
    helper = Helper()
    future = helper.submit(work)
    helper.close()
    return future


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
        self._kind, self._device, self._timeout = kind, device, timeout_s
        self._buffers = [torch.empty(capacity, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._fills = _fills(device)
        self._stores: dict[str, tuple[dist.TCPStore, str, str, int]] = {}
        """of each server: where it meets this process, at which address, under which name, and how many meet"""
        self._groups: dict[str, _Group] = {}

    def buffer(self, slot: int) -> Tensor:
        return self._buffers[slot]

    def endpoint(self, url: str, workers: int) -> Endpoint:
        host, name = _address_towards(url), uuid.uuid4().hex
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
        group = _group(self._kind, dist.PrefixStore(name, store), 0, size, self._device, own, self._timeout)
        self._groups[url] = group
        group.meet()

    def filled(self, slot: int) -> None:
        if self._fills:
            self._fills[slot].record(torch.cuda.current_stream(self._device))

    def deliver(self, url: str, slot: int, nbytes: int) -> None:
        _wait_for(self._fills, slot, self._device)
        self._groups[url].broadcast(self._buffers[slot][:nbytes])

    def drop(self, url: str) -> None:
        self._groups[url].abort()

    def close(self) -> None:
        for group in self._groups.values():
            group.abort()
        self._groups.clear()
        self._stores.clear()


class _GroupInbox:
    def __init__(self, endpoint: Mapping[str, Any], worker: int, device: torch.device, timeout_s: float):
        host, port, timeout = endpoint["host"], endpoint["port"], timedelta(seconds=timeout_s)
        self._device = device
        self._store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        prefixed = dist.PrefixStore(endpoint["name"], self._store)
        own = _source_address(host, port)
        self._group = _group(endpoint["kind"], prefixed, 1 + worker, endpoint["size"], device, own, timeout_s)
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


class _Group(Protocol):
    """A process group beside, and unknown to, the ones that trainer and vLLM have. Rank 0 sends. The first failure ends it."""

    def meet(self) -> None:
        """Waits for the others.

        Raises:
            RuntimeError: not all came within the time-out, or they cannot be a group.
        """
        ...

    def broadcast(self, data: Tensor) -> None:
        """Returns when all of it is here, or sent.

        Raises:
            RuntimeError: a member is gone, it took longer than the time-out, or the group has ended.
        """
        ...

    def abort(self) -> None:
        """Ends it, and what is under way."""
        ...


def _group(kind: str, store: dist.Store, rank: int, size: int, device: torch.device, address: str, timeout_s: float) -> _Group:
    """
    Args:
        address: this process's own, towards the others.
        timeout_s: of each wait.
    """
    return (
        _NcclGroup(store, rank, size, device, timeout_s) if kind == "nccl" else _GlooGroup(store, rank, size, address, timeout_s)
    )


_ENDED = "the connection was given up after an earlier failure"


class _GlooGroup:
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
            raise RuntimeError(_ENDED)
        try:
            group.broadcast([data], _from_first(self._timeout)).wait()
        except RuntimeError:
            self.abort()
            raise

    def abort(self) -> None:
        self._group = None


class _NcclGroup:
    """Not run on a GPU yet.

    It has no watchdog: torch's ends the process when another member is gone, even where it is told to clean up only, by way of
    the default group's monitor. Whoever broadcasts finds errors out and has the group aborted.

    Broadcasts have a stream of their own: on a common one, two senders that reach two servers in different orders wait for ever.
    And a thread of its own, which keeps the events that torch makes for each: it has some for every thread and never frees them.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float):
        self._device, self._timeout = device, timeout_s
        options = dist.ProcessGroupNCCL.Options()
        options._timeout, options.group_name = timedelta(seconds=timeout_s), "weights"
        with _environment("TORCH_NCCL_BLOCKING_WAIT", "1"):  # read when a group is made: then it has no watchdog
            self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        self._stream, self._helper = torch.cuda.Stream(device), Helper()

    def meet(self) -> None:
        """NCCL connects at the first collective: so here is one."""
        first = torch.zeros(1, dtype=torch.uint8, device=self._device)
        torch.cuda.current_stream(self._device).synchronize()
        self.broadcast(first)

    def broadcast(self, data: Tensor) -> None:
        group = self._group
        if group is None:
            raise RuntimeError(_ENDED)
        try:
            self._helper.submit(partial(self._broadcast, group, data)).result(self._timeout + SLACK_SECONDS)
        except TimeoutError:  # a communicator that lacks a member is waited for without end
            self.abort()
            raise RuntimeError(f"NCCL: not all members came within {self._timeout:g} s") from None
        except RuntimeError:
            self.abort()
            raise

    def abort(self) -> None:
        """NCCL keeps communicators, and kernels that wait, until it is told; which may hang, too."""
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError, TimeoutError):
                aside(group.abort).result(ABORT_SECONDS)
            self._helper.close()

    def _broadcast(self, group: Any, data: Tensor) -> None:
        end = time.monotonic() + self._timeout
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            work = group.broadcast([data], _from_first(timedelta(seconds=self._timeout)))
            # The host waits, no stream does: with CUDA_DEVICE_MAX_CONNECTIONS = 1 every other stream would wait behind it.
            while not work.is_completed():
                if time.monotonic() > end:
                    raise RuntimeError(f"NCCL: a broadcast of {data.nbytes} bytes took longer than {self._timeout:g} s")
                time.sleep(POLL_SECONDS)
            work.wait()  # it is over, or has failed and raises


def _from_first(timeout: timedelta) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor, options.timeout = 0, 0, timeout
    return options


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _fills(device: torch.device) -> list[torch.cuda.Event]:
    """For each buffer on a GPU, when it is full; on a CPU it is when the thread that fills it says so."""
    return [torch.cuda.Event(blocking=True) for _ in range(SLOTS)] if device.type == "cuda" else []


def _wait_for(fills: list[torch.cuda.Event], slot: int, device: torch.device) -> None:
    if fills:
        with torch.cuda.device(device):  # a new thread is on GPU 0, where it would leave a context
            fills[slot].synchronize()


class _IpcOutbox:
    """Not run on a GPU yet."""

    mapped = True

    def __init__(self, capacity: int, device: torch.device):
        self._device = device
        self._buffers = _shared_buffers(capacity, device)
        self._fills = _fills(device)

    def buffer(self, slot: int) -> Tensor:
        return self._buffers[slot]

    def endpoint(self, url: str, workers: int) -> Endpoint:
        # An export for each worker: CUDA counts the openings of each by itself.
        handles = [[_exported(buffer) for buffer in self._buffers] for _ in range(workers)]
        return {"kind": "ipc", "handles": handles}

    def connect(self, url: str) -> None:
        pass

    def filled(self, slot: int) -> None:
        if self._fills:
            self._fills[slot].record(torch.cuda.current_stream(self._device))

    def deliver(self, url: str, slot: int, nbytes: int) -> None:
        _wait_for(self._fills, slot, self._device)

    def drop(self, url: str) -> None:
        pass

    def close(self) -> None:
        self._buffers = []


class _IpcInbox:
    """Not run on a GPU yet."""

    def __init__(self, endpoint: Mapping[str, Any], worker: int, device: torch.device):
        self._buffers = [_imported(handle, device) for handle in endpoint["handles"][worker]]

    def receive(self, slot: int, nbytes: int) -> Tensor:
        return self._buffers[slot][:nbytes]

    def close(self) -> None:
        self._buffers.clear()


_SHARED: dict[torch.device, list[Tensor]] = {}
"""Buffers that other processes have opened. torch keeps such memory until each of them has let go, which one that is killed never
does: so a process has them once, and every outbox of it takes the same."""


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


def is_local(url: str) -> bool:
    """Whether a server's address is one of this host's own."""
    parts = urlsplit(url)
    try:
        address = _route(parts.hostname or "", parts.port or 80)
    except OSError:
        return False
    return address.own == address.other or ipaddress.ip_address(address.other).is_loopback


def _address_towards(url: str) -> str:
    """The address of this host that a server sees it under."""
    parts = urlsplit(url)
    return _source_address(parts.hostname or "", parts.port or 80)


def _source_address(host: str, port: int) -> str:
    return _route(host, port).own


class _Route(NamedTuple):
    """Addresses of this host and another one, as they see each other."""

    own: str
    other: str


def _route(host: str, port: int) -> _Route:
    """Packets would leave from there; none are sent.

    Raises:
        OSError: there is no such host, or no way to it.
    """
    failure = OSError(f"{host} has no address")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    for family, kind, protocol, _, address in sorted(found, key=lambda each: each[0] != socket.AF_INET):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return _Route(probe.getsockname()[0], address[0])
        except OSError as error:
            failure = error
    raise failure
