"""Transports: how a bucket's bytes get from a sender to the workers of servers. Each is one class in one file of this folder.

    shm    memory of the sender that the workers map; one host
    gloo   broadcast over TCP; any hosts
    nccl   the same between GPUs (not run on a GPU yet)
    ipc    a sender's GPU memory that the workers map; one host (not run on a GPU yet)

The folder is the registry: a file's name is the transport's name, the value of `rollout.transport` and an endpoint's ``kind``.
This module does without torch, because settings ask it for the names. See docs/how-to/add_a_transport.md.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from tulu_mega.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ORDER = ("shm", "gloo", "nccl", "ipc")
"""Order in which help and messages list the transports; one that is not here comes after these, by its name."""

Endpoint = dict[str, Any]
"""What an inbox needs to know of an outbox, as JSON; ``kind`` is the transport's name."""


class Outbox(Protocol):
    """The sending end: a sender's buffers, `protocol.SLOTS` of them, and a way to every server.

    One outbox serves all servers: where workers map its buffers each byte is written once, whatever their number.
    """

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
        """Waits until the server's workers, which were given the endpoint meanwhile, are attached.

        Raises:
            RuntimeError: they did not come within the time-out.
        """
        ...

    def filled(self, slot: int) -> None:
        """Called where a buffer was filled, by the same thread: what was asked of a GPU until now is part of it."""
        ...

    def deliver(self, url: str, slot: int, nbytes: int) -> None:
        """Brings a filled buffer's first bytes to a server's workers. Called by other threads than the one that fills.

        Where workers map the buffer this waits until it is full; they are told of it afterwards. Else the workers have been
        told, or are told meanwhile, and this returns when all of them have the bytes.

        Raises:
            RuntimeError: they did not come, or went away; within the time-out.
        """
        ...

    def drop(self, url: str) -> None:
        """Give a server up: end every delivery to it."""
        ...

    def close(self) -> None:
        """Lets go of buffers and connections."""
        ...


class Inbox(Protocol):
    """The receiving end: a worker's end of one sender's outbox."""

    def receive(self, slot: int, nbytes: int) -> Tensor:
        """Returns the bytes, uint8; valid until the bucket is acknowledged."""
        ...

    def close(self) -> None:
        """Lets go of buffers and connections."""
        ...


class Transport(ABC):
    """Base of all transports: what the others have to know of one, and how to make its two ends. It is never instantiated."""

    name: ClassVar[str]
    """its file's name"""
    device: ClassVar[Literal["cpu", "cuda"]]
    """where the buffers lie at both ends; `cuda` needs a trainer on GPUs"""
    same_host: ClassVar[bool]
    """whether the ranks that send and the servers have to be on one host"""
    mapped: ClassVar[bool]
    """whether workers read a sender's buffers themselves once these are full, in any order; else they wait for the bucket that is
    sent next, and buckets go one after the other"""
    joins_gpu_once: ClassVar[bool] = False
    """whether a sender and a worker may not be on one GPU"""
    automatic: ClassVar[bool] = False
    """whether `rollout.transport = "auto"` may choose it: one for the device of the parameters, of one host before others"""

    @staticmethod
    @abstractmethod
    def outbox(capacity: int, device: torch.device, timeout_s: float) -> Outbox:
        """Makes the sending end.

        Args:
            capacity: bytes of a buffer.
            device: of the sender.
            timeout_s: seconds that waiting for the other end may take.
        """

    @staticmethod
    @abstractmethod
    def inbox(endpoint: Mapping[str, Any], worker: int, device: torch.device, timeout_s: float) -> Inbox:
        """Makes the receiving end.

        Args:
            endpoint: the sender's.
            worker: this worker's rank in its server.
            device: of the worker.
            timeout_s: seconds that waiting for the other end may take.
        """


def names() -> list[str]:
    """The names of all transports. Imports none of them."""
    found = sorted(each.name for each in pkgutil.iter_modules(__path__))
    return sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


def named(name: str) -> type[Transport]:
    """The transport of a name: the one class of its file that is a `Transport`.

    Raises:
        UserError: there is none, which the other end of a connection has.
    """
    if name not in names():
        raise UserError(
            f"transport {name!r} is unknown here, expected one of {', '.join(names())}; install one version at both ends"
        )
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Transport) and each.__module__ == module.__name__
    )
    return found


def chosen(asked: str, device: str, near: bool) -> type[Transport]:
    """The transport that `rollout.transport` means.

    Args:
        asked: `rollout.transport`.
        device: type of the device that the trainer's parameters are on.
        near: whether all servers are on the hosts of all ranks that send.

    Raises:
        UserError: memory is to be shared between hosts, or a trainer without GPUs is to send from them.
    """
    if asked == "auto":
        fitting = [
            each for each in map(named, names()) if each.automatic and each.device == device and (near or not each.same_host)
        ]
        return max(fitting, key=lambda each: each.same_host)
    found, every = named(asked), [named(each) for each in names()]
    if found.same_host and not near:
        use = [each.name for each in every if not each.same_host]
        raise UserError(
            f"rollout.transport = {asked} shares memory, but some servers are on other hosts than the ranks that send; "
            f"use {', '.join(use)} or auto"
        )
    if found.device != "cpu" and device != found.device:
        use = [each.name for each in every if each.device == "cpu"]
        raise UserError(f"rollout.transport = {asked} needs GPUs, this trainer has none; use {', '.join(use)} or auto")
    return found
