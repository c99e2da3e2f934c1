"""Workers reduced to what they receive: processes without a model, at the other end of a transport."""

from __future__ import annotations

from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.lib import world
from tulu_mega.weight_transfer import transports
from tulu_mega.weight_transfer.protocol import checksum

URL = "http://127.0.0.1:1"
CPU = torch.device("cpu")


def receive(
    pipe: Connection, endpoint: Mapping[str, Any], worker: int, slot: int, nbytes: int, folder: Path | None = None
) -> None:
    """Attaches, says so, waits to be told, receives a bucket and tells its checksum; or what went wrong."""
    if folder:
        transports.__path__.append(str(folder))
    try:
        inbox = transports.named(endpoint["kind"]).inbox(endpoint, worker, CPU, 120)
        pipe.send("attached")
        pipe.recv()
        pipe.send(checksum(inbox.receive(slot, nbytes)))
        inbox.close()
    except RuntimeError as error:
        pipe.send(str(error))


def started(
    endpoint: Mapping[str, Any], worker: int, slot: int, nbytes: int, folder: Path | None = None
) -> tuple[Connection, BaseProcess]:
    """Starts such a process.

    Args:
        folder: where more transports are found.
    """
    ours, theirs = world.CONTEXT.Pipe()
    process = world.process(receive, theirs, endpoint, worker, slot, nbytes, folder, daemon=True)
    process.start()
    theirs.close()
    return ours, process


def check_crossing(kind: str, url: str = URL, folder: Path | None = None) -> None:
    """Has a bucket of a million bytes cross to two workers."""
    workers, nbytes = 2, 1_000_003
    box = transports.named(kind).outbox(nbytes, CPU, 120)
    endpoint = box.endpoint(url, workers)
    found = [started(endpoint, worker, 1, nbytes, folder) for worker in range(workers)]
    box.connect(url)
    for pipe, _ in found:
        assert pipe.poll(120)
        assert pipe.recv() == "attached"
    torch.manual_seed(0)
    box.buffer(1).copy_(torch.randint(0, 255, (nbytes,), dtype=torch.uint8))
    box.filled(1)
    for pipe, _ in found:
        pipe.send("now")
    box.deliver(url, 1, nbytes)
    for pipe, process in found:
        assert pipe.poll(120)
        assert pipe.recv() == checksum(box.buffer(1))
        process.join(20)
    box.close()
