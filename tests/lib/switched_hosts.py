"""Hosts with networks of their own on one switch, as Linux's network namespaces; processes of a test move into them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.namespaces import Host

_CLONE_NEWNET = 0x40000000


def move_to(host: Host) -> None:
    """Moves this thread, and those that it starts, to a host's network."""
    file = os.open(Path("/run/netns", host.name), os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(file, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot move to the network of {host.name}")
    finally:
        os.close(file)


@contextlib.contextmanager
def switched(prefix: str, network: str, count: int) -> Iterator[list[Host]]:
    """So many hosts, each by a cable to one switch; skips the test where they cannot be made.

    Args:
        prefix: of names, two letters.
        network: the first three numbers of its addresses: ``10.213.8``.
    """
    own = f"{prefix}{os.getpid()}"
    switch = f"{own}s"
    hosts = [Host(f"{own}{at}", f"{own}v{at}"[-14:], f"{network}.{at + 1}") for at in range(count)]
    if subprocess.run(["ip", "netns", "add", switch], capture_output=True).returncode:
        pytest.skip("network namespaces may not be made here")
    try:
        made = subprocess.run(["ip", "-n", switch, "link", "add", "sw", "type", "bridge"], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no switch can be made here: {made.stderr.strip()}")
        ip(f"-n {switch} link set sw up")
        for host in hosts:
            ip(f"netns add {host.name}")
            ip(f"-n {switch} link add {host.device} type veth peer name eth0 netns {host.name}")
            ip(f"-n {switch} link set {host.device} master sw up")
            for words in (f"addr add {host.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                ip(f"-n {host.name} {words}")
        yield hosts
    finally:
        time.sleep(0.1)  # what was killed there is gone then
        for name in (*(host.name for host in hosts), switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


def slow_down(host: Host, megabits: int) -> None:
    """Lets a host send no faster than that; skips the test where the kernel cannot."""
    shaped = f"qdisc add dev eth0 root tbf rate {megabits}mbit burst 32kb latency 100ms"
    done = subprocess.run([*host.within, "tc", *shaped.split()], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be slowed down here: {done.stderr.strip()}")
