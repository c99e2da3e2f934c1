"""Worlds of gloo processes for tests: `run(size, function, *args)` calls it on every rank and gathers what it returns."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
import traceback
from typing import Any

from torch.distributed import TCPStore

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed.warm"])


def free_port() -> int:
    """A port that nobody listens on, from below the range out of which others are given one when they ask for any."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("100 ports between 20000 and 32000 are all taken")


def _rank_main(rank: int, size: int, port: int, pipe, function, args) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    try:
        pipe.send((True, function(*args)))
    except BaseException as error:
        pipe.send((False, f"rank {rank}: {error!r}\n{traceback.format_exc()}"))
    pipe.close()
    os._exit(0)  # gloo's threads of a failed world must not keep the process


def run(size: int, function, *args, timeout: float = 240) -> list[Any]:
    """Results by rank.

    Raises:
        AssertionError: with the tracebacks of the ranks that failed or the ranks that did not answer in time.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # here: rank 0 might find its port taken by then
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_rank_main, args=(rank, size, store.port, theirs, function, args))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results: list[Any] = [None] * size
    problems = []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout if not problems else 5):
                problems.append(f"rank {rank}: no answer within {timeout} s")
                continue
            try:
                fine, value = pipe.recv()
            except EOFError:
                fine, value = False, f"rank {rank}: ended without an answer"
            if fine:
                results[rank] = value
            else:
                problems.append(value)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert not problems, "\n".join(problems)
    return results
