"""Transports between GPUs, on a machine without one: what lies around CUDA's and NCCL's own calls."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.weight_transfer.receivers import CPU
from tulu_mega.weight_transfer.protocol import SLOTS
from tulu_mega.weight_transfer.transports import ipc, named
from tulu_mega.weight_transfer.transports import nccl as nccl_groups
from tulu_mega.weight_transfer.waiting import in_daemon_thread


def test_memory_that_others_opened_is_taken_again():
    """torch would keep it for a server that was killed before it let go, once for every outbox."""
    first = named("ipc").outbox(100, CPU, 1)
    at = [first.buffer(slot).data_ptr() for slot in range(SLOTS)]
    first.close()
    second = named("ipc").outbox(90, CPU, 1)
    assert [second.buffer(slot).data_ptr() for slot in range(SLOTS)] == at
    second.close()
    larger = named("ipc").outbox(200, CPU, 1)
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
    return lambda: nccl_groups.NcclGroup(None, 0, 2, torch.device("cuda", 0), 0.5)


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
    assert group.aborted and time.monotonic() - began < 60
    with pytest.raises(RuntimeError, match="given up after an earlier failure"):
        made.broadcast(ON_GPU)


def test_a_communicator_that_lacks_a_member_is_not_waited_for(nccl, monkeypatch):
    """NCCL waits for it within the call, which nothing ends."""
    for name in ("ABORT_SECONDS", "SLACK_SECONDS"):
        monkeypatch.setattr(nccl_groups, name, 0.1)
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
        in_daemon_thread(lambda: made.broadcast(ON_GPU)).result(60)
    assert len(threads) == 1
