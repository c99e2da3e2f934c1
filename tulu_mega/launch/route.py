"""By which address and interface this machine and the others of a run reach each other."""

from __future__ import annotations

import ipaddress
import socket
import time

import psutil

from tulu_mega.errors import UserError

_ANYWHERE = ("192.0.2.1", 9)
"""An address that no machine has (RFC 5737), to find the default route. Nothing is sent there."""
RESOLVE_SECONDS = 10.0
"""Seconds for which a failed look-up of a name is tried again."""


def own_address(master: str, port: int, given: str | None = None) -> str:
    """The address by which the others of a run reach this machine: that on the way to the machine which they meet at.

    A name is not handed on: this machine's own is often unknown to the others, or stands for its loopback here.

    Args:
        master: name or address of that machine.
        given: what the user calls this machine, if anything.

    Raises:
        UserError: a name that is not known here, or one that leads to this machine's loopback.
    """
    found = resolved(master, port, "MASTER_ADDR")
    alone = _loopback(master)
    if given:
        own = resolved(given, port, "LOCAL_ADDR")
        reached = [each for each in own if alone or not _loopback(each)]
        if not reached:
            raise UserError(
                f"LOCAL_ADDR = {given}: leads to {', '.join(own)}, which only this machine reaches; give its address in the "
                f"network of MASTER_ADDR = {master}"
            )
        return reached[0]
    ways = [way for address in found if (way := _way(address, port))]
    if not ways:
        raise UserError(
            f"MASTER_ADDR = {master} ({', '.join(found)}): no network route leads there from this machine; check its network"
        )
    if alone:
        return ways[0]
    # the machine itself, by a name that stands for its loopback there, as Debian's /etc/hosts has it
    others = [*ways, *filter(None, [_way(*_ANYWHERE)]), *(address for _, address in _interfaces())]
    return next((each for each in others if not _loopback(each)), ways[0])


def interface(address: str) -> str | None:
    """The name of the network interface that has an address; None where none has."""
    return next((name for name, each in _interfaces() if each == address), None)


def resolved(host: str, port: int, setting: str) -> list[str]:
    """The addresses of a host, those of IPv4 first.

    Raises:
        UserError: there is no such host.
    """
    end = time.monotonic() + RESOLVE_SECONDS
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            break
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN and time.monotonic() < end:
                time.sleep(0.5)
                continue
            raise UserError(
                f"{setting} = {host}: no such machine is known here ({error.strerror}); write its address, or have it resolved"
            ) from None
    return list(dict.fromkeys(each[4][0] for each in sorted(found, key=lambda each: each[0] != socket.AF_INET)))


def _way(address: str, port: int) -> str | None:
    """Return this machine's address on the route to another machine; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port))
            return probe.getsockname()[0]
    except OSError:
        return None


def _interfaces() -> list[tuple[str, str]]:
    """Name and IPv4 or IPv6 address of what is up, loopback last; addresses that hold on one cable only are left out."""
    up = {name for name, each in psutil.net_if_stats().items() if each.isup}
    found = [
        (name, each.address)
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
        for each in addresses
        if each.family in (socket.AF_INET, socket.AF_INET6) and "%" not in each.address
    ]
    return sorted(found, key=lambda each: _loopback(each[1]))


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
