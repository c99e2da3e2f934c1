"""Moves bytes from one process to another through memory that both map, as a trainer's weights go to a vLLM worker of its host.

    python3 tools/bench_ipc.py                       GPU memory by CUDA IPC (says so, and no more, where there is no CUDA device)
    python3 tools/bench_ipc.py --device cpu          host memory, to see that it works
    python3 tools/bench_ipc.py --mib 1024 --rounds 20

One process makes the outbox of `tulu_mega.weight_transfer`, fills its buffers and tells of each; the other, which sees the device
under a name of its own (`CUDA_VISIBLE_DEVICES`), maps them, copies each to memory of its own and answers with a checksum. Prints
one JSON line: the checksums of all rounds, GB/s of the worker's copies out of the mapped memory, GB/s of the same copy within
the worker's own memory in the same run, and the first over the second. Exit status 1 when bytes differ or something failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

TIMEOUT_S = 60
WORKER = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--mib", type=int, help="of a buffer: 1024, on a CPU 16")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        if options.device == "cuda":
            parser.error("torch sees no CUDA device; run this on a GPU machine or with --device cpu")
        print(json.dumps({"bench": "ipc", "not_run": "torch sees no CUDA device"}))
        return 0
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", 0)
    size = (options.mib or (16 if device.type == "cpu" else 1024)) << 20
    if size < 1 or options.rounds < 1:
        parser.error(f"--mib {options.mib} --rounds {options.rounds}: expected at least 1")
    report: dict[str, Any] = {"bench": "ipc", "transport": "shm" if device.type == "cpu" else "ipc", "gib": size / 2**30}
    try:
        report |= send(device, size, options.rounds)
    except Exception as error:
        traceback.print_exc()
        report |= {"ok": False, "failed": f"{type(error).__name__}: {str(error)[:300]}"}
    print(json.dumps(report), flush=True)
    return 0 if report["ok"] else 1


def send(device, size: int, rounds: int) -> dict[str, Any]:
    """Fills and tells of buffers, and compares what arrived with what was sent.

    Raises:
        RuntimeError: the worker failed or did not answer.
    """
    import torch

    from tulu_mega.weight_transfer.protocol import SLOTS
    from tulu_mega.weight_transfer.transports import named

    outbox = named("shm" if device.type == "cpu" else "ipc").outbox(size, device, TIMEOUT_S)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = (visible or "0").split(",")[0] if device.type == "cuda" else ""
    worker = context.Process(target=receive, args=(theirs, device.type, size), daemon=True)
    worker.start()  # a process of its own, with the device as its only one, as vLLM's workers are started
    if visible is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    theirs.close()
    try:
        ours.send(outbox.endpoint("bench", workers=1))
        answer(ours)
        seconds, equal = [], []
        for round_ in range(rounds):
            slot = round_ % SLOTS
            buffer = outbox.buffer(slot)[:size]
            buffer.random_(0, 256, generator=torch.Generator(device).manual_seed(round_))
            outbox.filled(slot)
            outbox.deliver("bench", slot, size)
            ours.send((slot, size))
            found = answer(ours)
            seconds.append(found["seconds"])
            equal.append(found["checksum"] == checksum(buffer))
        ours.send(None)
        own = answer(ours)["own"]
        worker.join(TIMEOUT_S)
    finally:
        worker.kill()
        outbox.close()
    through, within = size / min(seconds) / 1e9, size / own / 1e9
    return {
        "ok": all(equal),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "rounds": rounds,
        "equal": sum(equal),
        "gb_per_second": round(through, 2),
        "own_copy_gb_per_second": round(within, 2),
        "of_own_copy": round(through / within, 3),
    }


def answer(connection: Connection) -> dict[str, Any]:
    """What the worker says next.

    Raises:
        RuntimeError: nothing within the time-out, or that it failed.
    """
    if not connection.poll(TIMEOUT_S):
        raise RuntimeError(f"the worker gave no answer within {TIMEOUT_S} s")
    try:
        found = connection.recv()
    except EOFError:
        raise RuntimeError("the worker's process ended") from None
    if "failed" in found:
        raise RuntimeError(f"the worker failed: {found['failed']}")
    return found


def receive(connection: Connection, kind: str, size: int) -> None:
    """The worker: maps the buffers, copies out of them, and answers with checksums and seconds."""
    try:
        import torch

        from tulu_mega.weight_transfer.transports import named

        device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
        endpoint = connection.recv()
        inbox = named(endpoint["kind"]).inbox(endpoint, WORKER, device, TIMEOUT_S)
        own, other = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        connection.send({"attached": True})
        while (told := connection.recv()) is not None:
            slot, nbytes = told
            seconds = timed(own, inbox.receive(slot, nbytes))
            connection.send({"seconds": seconds, "checksum": checksum(own)})
        connection.send({"own": min(timed(other, own) for _ in range(5))})
        inbox.close()
    except Exception as error:
        traceback.print_exc()
        connection.send({"failed": f"{type(error).__name__}: {str(error)[:300]}"})


def timed(target, source) -> float:
    """Seconds of a copy, with its end awaited."""
    import torch

    wait = torch.cuda.synchronize if target.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    target.copy_(source)
    wait()
    return time.perf_counter() - start


def checksum(buffer) -> list[int]:
    """Two sums of a buffer's 8-byte words: plain, and each times its place, so that a swap shows. Whole on the device."""
    import torch

    words = buffer[: len(buffer) // 8 * 8].view(torch.int64)
    places = torch.arange(1, len(words) + 1, device=words.device, dtype=torch.int64)
    return [int(words.sum()), int((words * places).sum())]


if __name__ == "__main__":
    sys.exit(main())
