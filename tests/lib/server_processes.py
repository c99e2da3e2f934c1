"""A server's processes as the kernel sees them, and what its answers are compared with."""
from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from tulu_mega.config import RolloutSettings
from tulu_mega.inference.addresses import read_record
from tulu_mega.weight_transfer.server import ServerAddress

START_SECONDS = 240.0


def label(address: ServerAddress, version: int) -> None:
    """What a trainer's update does to the version, without the weights."""
    told, url = {"new_version": str(version)}, f"{address.url}/update_weight_version"
    answer = httpx.post(url, json=told, headers=with_key(address), timeout=120)
    assert answer.json()["success"]


def with_key(address: ServerAddress) -> dict[str, str]:
    return {"Authorization": f"Bearer {address.key}"}


def session_of(run_dir: Path, number: int) -> list[psutil.Process]:
    """All processes of a server, its keeper first."""
    record = read_record(run_dir / "servers", number)
    return members(record.pid) if record and record.pid else []


def members(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            pass
    return sorted(found, key=lambda process: process.create_time())


def gone(processes: list[psutil.Process], seconds: float = 60.0) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def until(condition: Callable[[], bool], seconds: float = START_SECONDS) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def left_over(segments: set[str], processes: list[psutil.Process]) -> set[str]:
    """What Intel's OpenMP left in shared memory of these processes."""
    names = set(os.listdir("/dev/shm")) - segments
    return {name for name in names if any(name.startswith(f"__KMP_REGISTERED_LIB_{process.pid}_") for process in processes)}


def mapped(processes: list[psutil.Process]) -> set[str]:
    """Names of the shared memory that processes have mapped."""
    names = set()
    for process in processes:
        for line in Path("/proc", str(process.pid), "maps").read_text().splitlines():
            if "/dev/shm/" in line:
                names.add(line.split("/dev/shm/")[1].split()[0])
    return names


def transformers_logp(model: Path, prompt: list[int], response: list[int], temperature: float, top_p: float) -> list[float]:
    """Log-probabilities of a response's tokens in the distribution they were drawn from: nucleus of the tempered softmax."""
    import torch

    with torch.no_grad():
        logits = _llama(model)(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    values = []
    for row, token in zip(logits.double() / temperature, response, strict=True):
        chances, order = row.softmax(-1).sort(descending=True)
        kept = order[(chances.cumsum(0) - chances) < top_p]
        assert token in kept
        values.append(float(row[token] - row[kept].logsumexp(-1)))
    return values


@functools.cache
def _llama(model: Path):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(model)


def rollout_settings(**values) -> RolloutSettings:
    return RolloutSettings(**{"servers": 2, "start_timeout": START_SECONDS, "request_timeout": 120.0, **values})
