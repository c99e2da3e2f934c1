"""Transports between processes on a CPU: bytes that cross, senders and servers that go away, other hosts."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests.lib.namespaces import needs_ip, two_hosts
from tests.weight_transfer.receivers import CPU, URL, check_crossing, started
from tulu_mega.weight_transfer.server import is_local
from tulu_mega.weight_transfer.transports import named
from tulu_mega.weight_transfer.waiting import in_daemon_thread


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


IPV6 = pytest.mark.skipif(not _has_ipv6(), reason="no IPv6")


@pytest.mark.parametrize(
    ("kind", "url"),
    [("shm", URL), ("gloo", URL), pytest.param("gloo", "http://[::1]:1", marks=IPV6)],
    ids=["shm", "gloo", "IPv6"],
)
def test_bytes_cross_between_processes(kind, url, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")  # is about the trainer's ranks
    check_crossing(kind, url)


def test_shared_memory_has_no_name_and_is_gone_with_its_users():
    before = named_segments()
    box = named("shm").outbox(1 << 20, CPU, 1)
    inbox = named("shm").inbox(box.endpoint(URL, 1), 0, CPU, 1)
    assert named_segments() == before
    box.buffer(0)[:3] = 5
    assert inbox.receive(0, 3).tolist() == [5, 5, 5]
    endpoint = box.endpoint(URL, 1)
    inbox.close()
    box.close()
    gc.collect()
    with pytest.raises(RuntimeError, match=r"cannot be opened|belongs to another") as caught:
        named(endpoint["kind"]).inbox(endpoint, 0, CPU, 1)
    assert "rollout.transport to gloo" in str(caught.value) or "another process" in str(caught.value)


def named_segments() -> set[str]:
    """Files in shared memory that this process has open or mapped; others' processes make theirs meanwhile."""
    opened = set()
    for each in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            opened.add(os.readlink(f"/proc/self/fd/{each}"))
    opened |= {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return {each for each in opened if each.startswith("/dev/shm/") and Path(each).exists()}


def test_memory_of_another_process_is_not_taken_for_the_senders():
    box = named("shm").outbox(4096, CPU, 1)
    endpoint = box.endpoint(URL, 1) | {"inode": 1}
    with pytest.raises(RuntimeError, match="not the sender's memory"):
        named(endpoint["kind"]).inbox(endpoint, 0, CPU, 1)
    box.close()


def test_a_dead_sender_ends_the_waiting():
    """The outbox goes away, with its store: whoever attaches or receives is told within the time-out."""
    box = named("gloo").outbox(64, CPU, 120)
    endpoint = box.endpoint(URL, 1)
    pipe, process = started(endpoint, 0, 0, 64)
    box.connect(URL)
    assert pipe.poll(120)
    assert pipe.recv() == "attached"
    pipe.send("now")
    box.close()
    del box
    gc.collect()
    assert pipe.poll(240)
    assert len(pipe.recv()) > 0
    process.join(60)


def test_where_a_server_is():
    assert is_local("http://127.0.0.1:8000") and is_local("http://127.0.0.2:8000")
    assert is_local("http://localhost:8000")
    assert not is_local("http://no-such-host.invalid:8000")


@IPV6
def test_where_a_server_with_an_ipv6_address_is():
    assert is_local("http://[::1]:8000")
    assert not is_local("http://[2001:db8::1]:8000")


def test_the_rendezvous_listens_where_its_server_comes_from_alone():
    box = named("gloo").outbox(64, CPU, 120)
    port = box.endpoint(URL, 1)["port"]
    listening = [each.laddr.ip for each in psutil.Process().net_connections("tcp") if each.laddr.port == port and not each.raddr]
    assert listening == ["127.0.0.1"]
    box.close()


SENDER = """
import sys, torch
from tulu_mega.weight_transfer.server import is_local
from tulu_mega.weight_transfer.transports import named
url, cpu = "http://10.213.9.2:8000", torch.device("cpu")
box = named("gloo").outbox(1000, cpu, 30)
print(__import__("json").dumps(box.endpoint(url, 1)), flush=True)
box.connect(url)
box.buffer(0).copy_(torch.arange(1000) % 251)
box.deliver(url, 0, 1000)
print(is_local(url), flush=True)
sys.stdin.read()
"""
RECEIVER = """
import json, sys, torch
from tulu_mega.weight_transfer.transports import named
endpoint = json.loads(sys.argv[1])
inbox = named(endpoint["kind"]).inbox(endpoint, 0, torch.device("cpu"), 30)
print(int(inbox.receive(0, 1000).sum()))
"""


@needs_ip
def test_another_host_is_reached_whatever_interface_the_ranks_have():
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}  # as the ranks of our launcher have it
    with two_hosts("tw", "10.213.9") as (here, there):
        command = [*here.within, sys.executable, "-c", SENDER]
        sender = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            command = [*there.within, sys.executable, "-c", RECEIVER, sender.stdout.readline()]
            received = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
            assert received.stdout.strip() == str(int((torch.arange(1000) % 251).sum())), received.stderr
            assert sender.stdout.readline().strip() == "False"
        finally:
            sender.kill()
            sender.wait()


def test_a_server_that_is_dropped_is_sent_nothing_more():
    box = named("gloo").outbox(64, CPU, 120)
    pipe, process = started(box.endpoint(URL, 1), 0, 0, 64)
    box.connect(URL)
    assert pipe.poll(120) and pipe.recv() == "attached"
    box.drop(URL)
    with pytest.raises(RuntimeError, match="given up"):
        box.deliver(URL, 0, 64)
    pipe.send("now")
    assert pipe.poll(240) and isinstance(pipe.recv(), str), "its worker is told at once"
    process.join(60)
    box.close()


FOR_EVER = """
import time
from tulu_mega.weight_transfer.waiting import in_daemon_thread
in_daemon_thread(lambda: time.sleep(600))
print("left")
"""


def test_what_never_returns_keeps_nobody():
    """Neither the caller nor the end of the process."""
    left = subprocess.run([sys.executable, "-c", FOR_EVER], capture_output=True, text=True, timeout=120)
    assert left.stdout == "left\n" and left.returncode == 0, left.stderr
    assert in_daemon_thread(lambda: 3).result(60) == 3
