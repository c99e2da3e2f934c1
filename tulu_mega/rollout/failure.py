"""What went wrong with one inference server, as an exception of its own: somebody else may be asked instead."""

from __future__ import annotations


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
