"""Hosts with networks of their own, as Linux's network namespaces: each reaches the other's address, and not its loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

needs_ip = pytest.mark.skipif(not shutil.which("ip"), reason="needs iproute2's ip for network namespaces")


@dataclass(frozen=True)
class Host:
    """One of two."""

    name: str
    device: str
    """its network interface besides lo"""
    address: str

    @property
    def within(self) -> list[str]:
        """Words before a command that runs there."""
        return ["ip", "netns", "exec", self.name]


@contextlib.contextmanager
def two_hosts(prefix: str, network: str) -> Iterator[list[Host]]:
    """Two hosts with a cable between them; skips the test where none can be made. What still runs in them is the caller's to end.

    Args:
        prefix: of names, two letters.
        network: the first three numbers of its addresses: ``10.213.7``.
    """
    ends = ((1, "a"), (2, "b"))
    hosts = [Host(f"{prefix}{os.getpid()}{end}", f"{prefix}v{os.getpid()}{end}"[-14:], f"{network}.{at}") for at, end in ends]
    if subprocess.run(["ip", "netns", "add", hosts[0].name], capture_output=True).returncode:
        pytest.skip("network namespaces may not be made here")
    try:
        subprocess.run(["ip", "netns", "add", hosts[1].name], check=True)
        pair = ["ip", "link", "add", hosts[0].device, "type", "veth", "peer", "name", hosts[1].device]
        made = subprocess.run(pair, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no pair of network devices can be made here: {made.stderr.strip()}")
        for host in hosts:
            for words in (
                f"link set {host.device} netns {host.name}",
                f"-n {host.name} addr add {host.address}/24 dev {host.device}",
                f"-n {host.name} link set {host.device} up",
                f"-n {host.name} link set lo up",
            ):
                subprocess.run(["ip", *words.split()], check=True)
        yield hosts
    finally:
        time.sleep(0.1)  # what was killed there is gone then
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
