"""This host's addresses, as other hosts see them."""

from __future__ import annotations

import ipaddress
import socket
from typing import NamedTuple
from urllib.parse import urlsplit


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
