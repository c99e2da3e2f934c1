"""What trainer ranks do in the tests of adapters that live in servers; top-level functions, for the fork server."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist

from tests.lib import jobs
from tests.weight_transfer.live.jobs import PROMPTS, SAMPLING, scored, settings
from tulu_mega.config import OptimSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.inference.reply import parsed, responses
from tulu_mega.inference.sampling import Sampling
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.records import Response
from tulu_mega.train.adapter_reference import AdapterReference
from tulu_mega.train.session import Session
from tulu_mega.vllm_plugin.batch_route import ROUTE
from tulu_mega.weight_transfer import push as pushing
from tulu_mega.weight_transfer.adapters import NAME, path
from tulu_mega.weight_transfer.attach import attach
from tulu_mega.weight_transfer.control import ServerControl
from tulu_mega.weight_transfer.push import SyncReport
from tulu_mega.weight_transfer.server import ServerAddress

LORA = {"rank": 3, "alpha": 6.0}
LONG = [11 * i % 509 for i in range(5, 185)]
"""More than a block of vLLM's cache on a CPU, of 128 tokens."""
MIXED = [(prompt, adapter) for prompt in (*PROMPTS, LONG) for adapter in (NAME, None)]


@dataclass
class Seen:
    """After an update, on rank 0: largest differences of log-probabilities between a server and the trainer."""

    report: SyncReport
    adapted: float
    """of answers that the adapter gave"""
    bare: float
    """of those that the model gave without it"""
    moved: float
    """between the trainer with the adapter and without, of the same tokens"""


def updates(
    directory: str,
    layout: dict[str, Any],
    servers: Sequence[ServerAddress],
    versions: Sequence[int],
    lora: dict[str, Any] | None = None,
    transport: str = "auto",
    keep_cache: bool = False,
    rehearse: bool = False,
    out: str | None = None,
) -> list[Seen]:
    """Trains adapters and gives them to servers, as often as there are versions; asks batches that mix requests with and without.

    Args:
        keep_cache: servers keep what they have of prompts.
        rehearse: before each question an update is rehearsed, after which vLLM throws all adapters out.
        out: where the adapters and the merged model go at the end.
    """
    rollout, seen = settings(transport=transport), []
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(jobs.session(directory, layout, lora=LoraSettings.model_validate(lora or LORA)))
        bare = AdapterReference(made.engine)
        optim = OptimSettings(name="sgd", lr=3.0, schedule="constant", warmup=0.0, clip=1.0, weight_decay=0.0)
        made.engine.prepare_training(optim, len(versions))
        connection = stack.enter_context(attach(made.sender(rollout), servers, rollout))
        if keep_cache:
            for control in connection.led.values():
                control.reset_prefix_cache = lambda: None
                control.pause = partial(control._ask, "POST", "/pause", params={"mode": "keep", "clear_cache": "false"})
        for step, version in enumerate(versions):
            trained(made, step)
            report = pushing.push(connection, version)
            if rehearse:
                assert pushing.push(connection, 0, load=False).failed == {}
            box: list[Any] = [None]
            if made.lead and not report.failed:
                box = [[each for server in servers for each in asked(server, MIXED, version, made.engine.hf.vocab_size)]]
            dist.broadcast_object_list(box, src=0)
            if box[0] is None:
                return [Seen(report, *[float("inf")] * 3)]
            seen.append(compared(made, bare, report, box[0]))
        if out:
            made.export_adapters(Path(out, "adapter"), torch.float32)
            made.export(Path(out, "hf"), torch.float32, {})
    return seen


def trained(made: Session, step: int) -> None:
    """One step of the adapters."""
    micro = jobs.share(made, jobs.sequences(made.engine.hf.vocab_size, seed=3 + step), 2)
    made.engine.optimizer_step(step, made.engine.forward_backward(micro, SftObjective("token_mean")).loss)


def compared(made: Session, bare: AdapterReference, report: SyncReport, told: list[tuple[str | None, Response]]) -> Seen:
    """What servers say beside what the trainer computes, with the adapter and without."""
    every = [each for _, each in told]
    made.engine.settle()
    with_it, without = scored(made, made.engine.score, every), scored(made, bare.score, every)
    worst = {NAME: 0.0, None: 0.0}
    wanted = [(with_it if name else without)[at] for at, (name, _) in enumerate(told)]
    for (adapter, each), ours in zip(told, wanted, strict=True):
        assert len(ours) == len(each.sampler_logp)
        worst[adapter] = max(worst[adapter], *(abs(a - b) for a, b in zip(ours, each.sampler_logp, strict=True)))
    moved = max(abs(a - b) for one, other in zip(with_it, without, strict=True) for a, b in zip(one, other, strict=True))
    return Seen(report, worst[NAME], worst[None], moved)


def asked(
    server: ServerAddress,
    prompts: Sequence[tuple[list[int], str | None]],
    version: int,
    vocabulary: int,
    sampling: Sampling = SAMPLING,
) -> Iterator[tuple[str | None, Response]]:
    """What a server answers to one batch, each with the adapter that was asked for."""
    body = [
        {"token_ids": ids, "sampling_params": sampling.parameters(number), **({"adapter": adapter} if adapter else {})}
        for number, (ids, adapter) in enumerate(prompts)
    ]
    answer = httpx.post(f"{server.url}{ROUTE}", json={"prompts": body}, headers=key(server), timeout=120)
    assert answer.status_code == 200, answer.text
    for line in answer.text.splitlines():
        told = parsed(line.encode())
        ids, adapter = prompts[told["place"]]
        assert told["adapter"] == (path(version) if adapter == NAME else None)
        for each in responses(told, ids, sampling, version, vocabulary):
            yield adapter, each


def key(server: ServerAddress) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.key}"}


def base_of(server: ServerAddress) -> list[str]:
    """Each worker's word for its weights."""
    control = ServerControl(server.url, server.key, 60)
    told = [worker["base"] for worker in control.weights_status()]
    control.close()
    return told


def pretty(seen: Sequence[Seen]) -> str:
    return json.dumps([[each.adapted, each.bare, each.moved, each.report.bytes] for each in seen])
