"""Process groups of a sender and a server's workers."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_mega.weight_transfer.transports.helper import Helper, aside

ABORT_SECONDS, SLACK_SECONDS = 20.0, 10.0
POLL_SECONDS = 2e-4
_ENDED = "the connection was given up after an earlier failure"


class Group(Protocol):
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


def group_of(kind: str, store: dist.Store, rank: int, size: int, device: torch.device, address: str, timeout_s: float) -> Group:
    """
    Args:
        address: this process's own, towards the others.
        timeout_s: of each wait.
    """
    return NcclGroup(store, rank, size, device, timeout_s) if kind == "nccl" else GlooGroup(store, rank, size, address, timeout_s)


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
            raise RuntimeError(_ENDED)
        try:
            group.broadcast([data], _from_first(self._timeout)).wait()
        except RuntimeError:
            self.abort()
            raise

    def abort(self) -> None:
        self._group = None


class NcclGroup:
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
