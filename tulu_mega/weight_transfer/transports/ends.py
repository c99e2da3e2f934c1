"""What a bucket goes through: an outbox on the trainer's side, an inbox on the worker's."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

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
