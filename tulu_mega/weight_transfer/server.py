"""One inference server as a trainer knows it: where it is, and what went wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServerAddress:
    """One server, as it can be spoken to now."""

    url: str
    key: str | None = field(repr=False)
    """bearer token for every request"""
    incarnation: int
    """another one after each restart, and larger"""


class ServerFailure(Exception):
    """A server that did not do what it was asked: unreachable, too slow, refusing, or answering nonsense.

    Args:
        url: the server's.
        reason: what was asked and what came of it.
    """

    def __init__(self, url: str, reason: str):
        self.url, self.reason = url, reason
        super().__init__(f"{url}: {reason}")

    def __reduce__(self):  # crosses process boundaries: ranks tell each other
        return type(self), (self.url, self.reason)
