"""One inference server as a trainer knows it: where it is, how this host reaches it, and what went wrong with it."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit


@dataclass(frozen=True)
class ServerAddress:
    """One server, and how to reach it now."""

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


def is_local(url: str) -> bool:
    """Whether a server's address is one of this host's own."""
    parts = urlsplit(url)
    try:
        address = _route(parts.hostname or "", parts.port or 80)
    except OSError:
        return False
    return address.own == address.other or ipaddress.ip_address(address.other).is_loopback


def address_towards(url: str) -> str:
    """The address of this host that a server sees it under."""
    parts = urlsplit(url)
    return source_address(parts.hostname or "", parts.port or 80)


def source_address(host: str, port: int) -> str:
    """The address of this host that another host sees it under."""
    return _route(host, port).own


class _Route(NamedTuple):
    """Addresses of this host and another one, as they see each other."""

    own: str
    other: str


def _route(host: str, port: int) -> _Route:
    """Return the addresses between which packets to a host would travel. It sends no packet.

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
