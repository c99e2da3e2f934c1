"""The pure parts of live weights: buckets, checksums, a worker's account, transports between processes."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.lib.namespaces import needs_ip, two_hosts
from tulu_mega.weight_transfer import transports
from tulu_mega.weight_transfer.ledger import Account
from tulu_mega.weight_transfer.protocol import (
    ALIGNMENT,
    SLOTS,
    Bucket,
    Expected,
    Place,
    _device_checksum,
    begin_message,
    bucket_message,
    checksum,
    plan_buckets,
    read_begin,
    read_bucket,
    view,
)
from tulu_mega.weight_transfer.transports import groups, ipc

MANIFEST = {
    "embed": Expected((5, 4), "float32", 0),
    "layer": Expected((4, 4), "bfloat16", 0),
    "head": Expected((5, 4), "float32", 1),
}
URL = "http://127.0.0.1:1"
CPU = torch.device("cpu")


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=30),
    st.integers(1, 2000),
)
def test_buckets_hold_everything_once_without_overlap(rows, limit):
    manifest = {f"t{i}": Expected((n, 3), "float32", 7) for i, n in enumerate(rows)}
    buckets = plan_buckets(7, manifest, manifest, limit)
    assert [place.name for bucket in buckets for place in bucket.places] == list(manifest)
    assert [bucket.slot for bucket in buckets] == [i % SLOTS for i in range(len(buckets))]
    for bucket in buckets:
        assert len(bucket.places) == 1 or bucket.nbytes <= limit
        end = 0
        for place in bucket.places:
            assert place.offset >= end
            assert place.offset % ALIGNMENT == 0
            assert place.nbytes == manifest[place.name].nbytes
            end = place.offset + place.nbytes


def test_messages_survive_json():
    import json

    bucket = Bucket(3, 1, (Place("embed", 0, 80), Place("layer", 128, 32)))
    version, read = read_bucket(json.loads(json.dumps(bucket_message(9, bucket)))["bucket"])
    assert (version, read) == (9, bucket)
    assert read_begin(json.loads(json.dumps(begin_message(9, MANIFEST, True)))["begin"]) == (9, True, MANIFEST)


def _on_device(data: torch.Tensor) -> str:
    """As on a GPU, where it is the same arithmetic."""
    return _device_checksum(data.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", [checksum, _on_device], ids=["cpu", "device"])
def test_a_checksum_is_of_the_bytes_alone_and_sees_each_of_them(of, dtype):
    torch.manual_seed(0)
    data = torch.randn(37, 11).to(dtype)
    buffer = torch.zeros(4096, dtype=torch.uint8)
    place = Place("t", 64, data.nbytes)
    placed = view(buffer, place, Expected((37, 11), str(dtype).removeprefix("torch."), 0))
    placed.copy_(data)
    assert of(placed) == of(data)
    seen = {of(data)}
    for at in (0, 1, 2, 3, 401, data.nbytes - 1):
        buffer[64 + at] ^= 16
        seen.add(of(placed))
        buffer[64 + at] ^= 16
    assert len(seen) == 7
    swapped = data.clone()
    swapped[[3, 4]] = data[[4, 3]]
    assert of(swapped) not in seen
    assert of(torch.zeros(8)) != of(torch.zeros(9))


def account() -> Account:
    return Account(worker=2, version=5, manifest=MANIFEST)


def whole(sender: int) -> Bucket:
    if sender == 1:
        return Bucket(1, 0, (Place("head", 0, 80),))
    return Bucket(0, 0, (Place("embed", 0, 80), Place("layer", 128, 32)))


def take(kept: Account, bucket: Bucket) -> None:
    assert kept.check(5, bucket, 1024), kept.problems
    for place in bucket.places:
        kept.arrived(place.name, f"hash of {place.name}")


SENT = {name: f"hash of {name}" for name in MANIFEST}


def test_a_whole_update_has_no_problems():
    kept = account()
    take(kept, whole(0))
    take(kept, whole(1))
    kept.compare(5, SENT)
    assert kept.problems == []
    assert kept.nbytes == 80 + 32 + 80


WRONG = {
    "unknown": (Bucket(0, 0, (Place("nobody", 0, 80),)), "nobody from trainer rank 0 is not in the manifest"),
    "twice": (whole(0), "embed from trainer rank 0 came a second time"),
    "twice in a bucket": (Bucket(1, 0, (Place("head", 0, 80), Place("head", 128, 80))), "head from trainer rank 1 came a second"),
    "of another": (Bucket(0, 0, (Place("head", 0, 80),)), "head from trainer rank 0 is for trainer rank 1 to send"),
    "size": (Bucket(1, 0, (Place("head", 0, 76),)), "head from trainer rank 1 has 76 bytes, expected 80 for [5, 4] of float32"),
    "outside": (Bucket(1, 0, (Place("head", 1000, 80),)), "head from trainer rank 1 lies outside the buffer of 1024 bytes"),
}


@pytest.mark.parametrize(("bucket", "told"), WRONG.values(), ids=WRONG)
def test_a_wrong_bucket_is_refused_by_name(bucket, told):
    kept = account()
    take(kept, whole(0))
    assert not kept.check(5, bucket, 1024)
    assert any(problem.startswith(f"worker 2: update 5: {told}") for problem in kept.problems), kept.problems


def test_a_bucket_of_another_update_is_refused():
    kept = account()
    assert not kept.check(4, whole(0), 1024)
    assert kept.problems == ["worker 2: update 5: a bucket from trainer rank 0 is of update 4"]


def test_what_is_missing_or_changed_is_refused_by_name():
    kept = account()
    take(kept, whole(0))
    kept.compare(5, SENT | {"embed": "another"})
    assert kept.problems == [
        "worker 2: update 5: embed from trainer rank 0 arrived with checksum hash of embed, was sent with another",
        "worker 2: update 5: head from trainer rank 1 did not come",
    ]
    kept = account()
    take(kept, whole(0))
    take(kept, whole(1))
    kept.compare(6, {"embed": SENT["embed"], "layer": SENT["layer"], "stranger": "x"})
    assert kept.problems == [
        "worker 2: update 5: the commit is of update 6",
        "worker 2: update 5: head from trainer rank 1 came, but its sender gave no checksum",
        "worker 2: update 5: stranger: has a checksum, but is not in the manifest",
    ]


def _receive(pipe, endpoint, worker, slot, nbytes) -> None:
    try:
        inbox = transports.inbox(endpoint, worker, CPU, 20)
        pipe.send("attached")
        pipe.recv()
        pipe.send(checksum(inbox.receive(slot, nbytes)))
        inbox.close()
    except RuntimeError as error:
        pipe.send(str(error))


def _worker(endpoint, worker, slot, nbytes):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_receive, args=(theirs, endpoint, worker, slot, nbytes), daemon=True)
    process.start()
    theirs.close()
    return ours, process


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
    workers, nbytes = 2, 1_000_003
    box = transports.outbox(kind, nbytes, CPU, 20)
    endpoint = box.endpoint(url, workers)
    found = [_worker(endpoint, worker, 1, nbytes) for worker in range(workers)]
    box.connect(url)
    for pipe, _ in found:
        assert pipe.poll(60)
        assert pipe.recv() == "attached"
    torch.manual_seed(0)
    box.buffer(1).copy_(torch.randint(0, 255, (nbytes,), dtype=torch.uint8))
    box.filled(1)
    for pipe, _ in found:
        pipe.send("now")
    box.deliver(url, 1, nbytes)
    for pipe, process in found:
        assert pipe.poll(20)
        assert pipe.recv() == checksum(box.buffer(1))
        process.join(20)
    box.close()


def test_shared_memory_has_no_name_and_is_gone_with_its_users():
    before = set(os.listdir("/dev/shm"))
    box = transports.outbox("shm", 1 << 20, CPU, 1)
    inbox = transports.inbox(box.endpoint(URL, 1), 0, CPU, 1)
    assert set(os.listdir("/dev/shm")) == before
    box.buffer(0)[:3] = 5
    assert inbox.receive(0, 3).tolist() == [5, 5, 5]
    endpoint = box.endpoint(URL, 1)
    inbox.close()
    box.close()
    gc.collect()
    with pytest.raises(RuntimeError, match=r"cannot be opened|belongs to another") as caught:
        transports.inbox(endpoint, 0, CPU, 1)
    assert "rollout.transport to gloo" in str(caught.value) or "another process" in str(caught.value)


def test_memory_of_another_process_is_not_taken_for_the_senders():
    box = transports.outbox("shm", 4096, CPU, 1)
    endpoint = box.endpoint(URL, 1) | {"inode": 1}
    with pytest.raises(RuntimeError, match="not the sender's memory"):
        transports.inbox(endpoint, 0, CPU, 1)
    box.close()


def test_a_dead_sender_ends_the_waiting():
    """The outbox goes away, with its store: whoever attaches or receives is told within the time-out."""
    box = transports.outbox("gloo", 64, CPU, 20)
    endpoint = box.endpoint(URL, 1)
    pipe, process = _worker(endpoint, 0, 0, 64)
    box.connect(URL)
    assert pipe.poll(60)
    assert pipe.recv() == "attached"
    pipe.send("now")
    box.close()
    del box
    gc.collect()
    assert pipe.poll(40)
    assert len(pipe.recv()) > 0
    process.join(20)


def test_where_a_server_is():
    assert transports.is_local("http://127.0.0.1:8000") and transports.is_local("http://127.0.0.2:8000")
    assert transports.is_local("http://localhost:8000")
    assert not transports.is_local("http://no-such-host.invalid:8000")


@IPV6
def test_where_a_server_with_an_ipv6_address_is():
    assert transports.is_local("http://[::1]:8000")
    assert not transports.is_local("http://[2001:db8::1]:8000")


def test_the_rendezvous_listens_where_its_server_comes_from_alone():
    box = transports.outbox("gloo", 64, CPU, 20)
    port = box.endpoint(URL, 1)["port"]
    listening = [each.laddr.ip for each in psutil.Process().net_connections("tcp") if each.laddr.port == port and not each.raddr]
    assert listening == ["127.0.0.1"]
    box.close()


SENDER = """
import sys, torch
from tulu_mega.weight_transfer import transports
url, cpu = "http://10.213.9.2:8000", torch.device("cpu")
box = transports.outbox("gloo", 1000, cpu, 30)
print(__import__("json").dumps(box.endpoint(url, 1)), flush=True)
box.connect(url)
box.buffer(0).copy_(torch.arange(1000) % 251)
box.deliver(url, 0, 1000)
print(transports.is_local(url), flush=True)
sys.stdin.read()
"""
RECEIVER = """
import json, sys, torch
from tulu_mega.weight_transfer import transports
inbox = transports.inbox(json.loads(sys.argv[1]), 0, torch.device("cpu"), 30)
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
            received = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
            assert received.stdout.strip() == str(int((torch.arange(1000) % 251).sum())), received.stderr
            assert sender.stdout.readline().strip() == "False"
        finally:
            sender.kill()
            sender.wait()


def test_memory_that_others_opened_is_taken_again():
    """torch would keep it for a server that was killed before it let go, once for every outbox."""
    first = transports.outbox("ipc", 100, CPU, 1)
    at = [first.buffer(slot).data_ptr() for slot in range(SLOTS)]
    first.close()
    second = transports.outbox("ipc", 90, CPU, 1)
    assert [second.buffer(slot).data_ptr() for slot in range(SLOTS)] == at
    second.close()
    larger = transports.outbox("ipc", 200, CPU, 1)
    assert all(len(larger.buffer(slot)) == 200 for slot in range(SLOTS))
    larger.close()
    ipc._SHARED.clear()


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ("", []),
        ("max_split_size_mb:512", []),
        ("expandable_segments:False", []),
        (
            "expandable_segments:True,max_split_size_mb:512",
            ["expandable_segments:False,max_split_size_mb:512", "expandable_segments:True,max_split_size_mb:512"],
        ),
    ],
)
def test_memory_to_be_opened_by_others_lies_in_plain_segments(monkeypatch, settings, written):
    calls = []
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: settings)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", calls.append)
    with contextlib.suppress(KeyError), ipc._plain_segments():
        assert calls == written[:1]
        raise KeyError
    assert calls == written


class Nccl:
    """In place of torch's group: broadcasts that a test ends."""

    Options = SimpleNamespace

    def __init__(self, *_: object):
        self.blocking = os.environ.get("TORCH_NCCL_BLOCKING_WAIT")
        self.aborted, self.done, self.wrong = False, False, None

    def broadcast(self, _data: list, _options: object):
        def wait() -> None:
            if self.wrong:
                raise RuntimeError(self.wrong)

        return SimpleNamespace(is_completed=lambda: self.done or self.wrong is not None, wait=wait)

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture
def nccl(monkeypatch):
    """Makes a group of two between GPUs that are not there, whose broadcasts may take half a second."""
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    return lambda: groups.NcclGroup(None, 0, 2, torch.device("cuda", 0), 0.5)


ON_GPU = SimpleNamespace(nbytes=7)


@pytest.mark.parametrize("before", [None, "0"])
def test_an_nccl_group_has_no_watchdog_that_ends_the_process(monkeypatch, nccl, before):
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    if before:
        monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", before)
    made = nccl()
    assert made._group.blocking == "1" and os.environ.get("TORCH_NCCL_BLOCKING_WAIT") == before


@pytest.mark.parametrize(("wrong", "told"), [(None, r"broadcast of 7 bytes took longer than 0\.5 s"), ("gone", "gone")])
def test_an_nccl_broadcast_is_waited_for_by_the_host_and_not_for_ever(nccl, wrong, told):
    """One that fails is the last: its communicator is aborted."""
    made, began = nccl(), time.monotonic()
    group = made._group
    group.done = True
    made.broadcast(ON_GPU)
    assert not group.aborted
    group.done, group.wrong = False, wrong
    with pytest.raises(RuntimeError, match=told):
        made.broadcast(ON_GPU)
    assert group.aborted and time.monotonic() - began < 5
    with pytest.raises(RuntimeError, match="given up after an earlier failure"):
        made.broadcast(ON_GPU)


def test_a_communicator_that_lacks_a_member_is_not_waited_for(nccl, monkeypatch):
    """NCCL waits for it within the call, which nothing ends."""
    for name in ("ABORT_SECONDS", "SLACK_SECONDS"):
        monkeypatch.setattr(groups, name, 0.1)
    made = nccl()
    made._group.broadcast = made._group.abort = lambda *_: time.sleep(60)
    with pytest.raises(RuntimeError, match=r"not all members came within 0\.5 s"):
        made.broadcast(ON_GPU)


def test_an_nccl_groups_broadcasts_are_of_one_thread(nccl):
    """torch keeps events for each thread that broadcasts, for ever."""
    made, threads = nccl(), set()
    made._group.done, broadcast = True, made._group.broadcast
    made._group.broadcast = lambda *given: threads.add(threading.get_ident()) or broadcast(*given)
    for _ in range(3):
        transports.aside(lambda: made.broadcast(ON_GPU)).result(5)
    assert len(threads) == 1


def test_a_server_that_is_dropped_is_sent_nothing_more():
    box = transports.outbox("gloo", 64, CPU, 20)
    pipe, process = _worker(box.endpoint(URL, 1), 0, 0, 64)
    box.connect(URL)
    assert pipe.poll(60) and pipe.recv() == "attached"
    box.drop(URL)
    with pytest.raises(RuntimeError, match="given up"):
        box.deliver(URL, 0, 64)
    pipe.send("now")
    assert pipe.poll(20) and isinstance(pipe.recv(), str), "its worker is told at once"
    process.join(20)
    box.close()


def test_what_never_returns_keeps_nobody():
    """Neither the caller nor the end of the process."""
    script = "import time; from tulu_mega.weight_transfer.transports import aside; aside(lambda: time.sleep(600)); print('left')"
    left = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert left.stdout == "left\n" and left.returncode == 0, left.stderr
    assert transports.aside(lambda: 3).result(5) == 3
