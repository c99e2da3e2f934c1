"""How a bucket's bytes get from a sender to the workers: an outbox on the trainer's side, an inbox on the worker's.

    shm    memory of the sender that the workers map; one host
    gloo   broadcast over TCP; any hosts
    nccl   the same between GPUs (not run on a GPU yet)
    ipc    a sender's GPU memory that the workers map; one host (not run on a GPU yet)

One outbox serves all servers. With mapped memory each byte is written once, whatever their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tulu_mega.weight_transfer.transports.broadcast import GroupInbox, GroupOutbox
from tulu_mega.weight_transfer.transports.ends import Inbox, Outbox
from tulu_mega.weight_transfer.transports.helper import aside
from tulu_mega.weight_transfer.transports.ipc import IpcInbox, IpcOutbox
from tulu_mega.weight_transfer.transports.routes import is_local
from tulu_mega.weight_transfer.transports.shm import SharedInbox, SharedOutbox

__all__ = ["Inbox", "Outbox", "aside", "inbox", "is_local", "outbox"]


def outbox(kind: str, capacity: int, device: torch.device, timeout_s: float) -> Outbox:
    """
    Args:
        kind: shm, gloo, nccl or ipc.
        capacity: bytes of a buffer.
        device: of the sender.
        timeout_s: of whatever waits for the other end.
    """
    if kind == "shm":
        return SharedOutbox(capacity)
    if kind == "ipc":
        return IpcOutbox(capacity, device)
    return GroupOutbox(kind, capacity, device if kind == "nccl" else torch.device("cpu"), timeout_s)


def inbox(endpoint: Mapping[str, Any], worker: int, device: torch.device, timeout_s: float) -> Inbox:
    """
    Args:
        endpoint: the sender's.
        worker: this worker's rank in its server.
        device: of the worker.
    """
    kind = endpoint["kind"]
    if kind == "shm":
        return SharedInbox(endpoint)
    if kind == "ipc":
        return IpcInbox(endpoint, worker, device)
    return GroupInbox(endpoint, worker, device if kind == "nccl" else torch.device("cpu"), timeout_s)
