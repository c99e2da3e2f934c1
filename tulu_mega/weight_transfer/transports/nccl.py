"""Buckets broadcast between GPUs by NCCL. Not run on a GPU yet."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_mega.weight_transfer.broadcast import ENDED, GroupInbox, GroupOutbox, from_first
from tulu_mega.weight_transfer.transports import Transport
from tulu_mega.weight_transfer.waiting import DaemonWorker, in_daemon_thread

ABORT_SECONDS, SLACK_SECONDS = 20.0, 10.0
POLL_SECONDS = 2e-4


class Nccl(Transport):
    """A broadcast to each server's workers; sender and workers are on GPUs of their own. Not run on a GPU yet."""

    name = "nccl"
    device = "cuda"
    same_host = False
    mapped = False
    joins_gpu_once = True
    automatic = True

    @staticmethod
    def outbox(capacity: int, device: torch.device, timeout_s: float) -> GroupOutbox:
        return GroupOutbox("nccl", _group, capacity, device, timeout_s)

    @staticmethod
    def inbox(endpoint: Mapping[str, Any], worker: int, device: torch.device, timeout_s: float) -> GroupInbox:
        return GroupInbox(endpoint, _group, worker, device, timeout_s)


def _group(store: dist.Store, rank: int, size: int, device: torch.device, address: str, timeout_s: float) -> NcclGroup:
    return NcclGroup(store, rank, size, device, timeout_s)  # NCCL finds its addresses by itself


class NcclGroup:
    """Not run on a GPU yet.

    The group has no watchdog. torch's watchdog ends the process when another member is gone, even where it is to clean up only,
    by way of the default group's monitor. The broadcasting thread finds errors itself and aborts the group.

    Broadcasts run on a stream of their own: on a common one, two senders that reach two servers in different orders
    wait for ever. They run in one dedicated thread: torch caches CUDA events for every thread and never frees them.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float):
        self._device, self._timeout = device, timeout_s
        options = dist.ProcessGroupNCCL.Options()
        options._timeout, options.group_name = timedelta(seconds=timeout_s), "weights"
        with _environment("TORCH_NCCL_BLOCKING_WAIT", "1"):  # read when a group is made: then it has no watchdog
            self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        self._stream, self._worker = torch.cuda.Stream(device), DaemonWorker()

    def meet(self) -> None:
        """NCCL connects at the first collective: so here is one."""
        first = torch.zeros(1, dtype=torch.uint8, device=self._device)
        torch.cuda.current_stream(self._device).synchronize()
        self.broadcast(first)

    def broadcast(self, data: Tensor) -> None:
        group = self._group
        if group is None:
            raise RuntimeError(ENDED)
        try:
            self._worker.submit(partial(self._broadcast, group, data)).result(self._timeout + SLACK_SECONDS)
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
                in_daemon_thread(group.abort).result(ABORT_SECONDS)
            self._worker.close()

    def _broadcast(self, group: Any, data: Tensor) -> None:
        end = time.monotonic() + self._timeout
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            work = group.broadcast([data], from_first(timedelta(seconds=self._timeout)))
            # The host waits, no stream does: with CUDA_DEVICE_MAX_CONNECTIONS = 1 every other stream would wait behind it.
            while not work.is_completed():
                if time.monotonic() > end:
                    raise RuntimeError(f"NCCL: a broadcast of {data.nbytes} bytes took longer than {self._timeout:g} s")
                time.sleep(POLL_SECONDS)
            work.wait()  # it is over, or has failed and raises


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
