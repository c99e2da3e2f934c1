"""What trainer ranks do in the tests of live weights; top-level functions, so that the fork server can find them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.lib import jobs
from tulu_mega.config import RolloutSettings
from tulu_mega.errors import UserError
from tulu_mega.inference.client import RolloutClient
from tulu_mega.inference.sampling import Sampling
from tulu_mega.records import IGNORE, Response, TokenizedRow
from tulu_mega.train.session import Session
from tulu_mega.weight_transfer import push as pushing
from tulu_mega.weight_transfer import sender
from tulu_mega.weight_transfer.attach import attach
from tulu_mega.weight_transfer.control import ServerControl
from tulu_mega.weight_transfer.protocol import checksum
from tulu_mega.weight_transfer.push import SyncReport
from tulu_mega.weight_transfer.server import ServerAddress

PROMPTS = [[7 * i % 509 for i in range(start, start + length)] for start, length in ((1, 40), (3, 17), (100, 64), (9, 2))]
SAMPLING = Sampling(max_tokens=24, temperature=1.0, samples=2, seed=5)


def make_other(directory: str, other: str) -> None:
    """The same model with other weights."""
    shutil.copytree(directory, other)
    torch.manual_seed(7)
    for file in Path(other).glob("*.safetensors"):
        moved = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in load_file(file).items()}
        save_file(moved, file, metadata={"format": "pt"})


def file_checksums(directory: str) -> dict[str, str]:
    """Hashes of the tensors in a model directory."""
    files = Path(directory).glob("*.safetensors")
    return {name: checksum(tensor) for file in files for name, tensor in load_file(file).items()}


def settings(**changes: Any) -> RolloutSettings:
    """With time-outs that a test can wait for."""
    return RolloutSettings(**{"update_timeout": 60.0, "request_timeout": 60.0, "retries": 0, **changes})


def push(
    directory: str,
    layout: dict[str, Any],
    servers: Sequence[ServerAddress],
    version: int,
    dtype: str = "fp32",
    export: str | None = None,
    changes: dict[str, Any] | None = None,
    precision: dict[str, Any] | None = None,
) -> tuple[SyncReport, float]:
    """Gives servers the model's weights, has each of them generate, and scores what came with the trainer.

    Args:
        export: where to write the model in Hugging Face format too, in its type.
        changes: of the rollout settings.
        precision: settings of that section.

    Returns:
        the report; the largest difference between a sampler's and the trainer's log-probability, on rank 0.
    """
    rollout = settings(**(changes or {}))
    with jobs.session(directory, layout, dtype, precision=precision) as made:
        with attach(made.sender(rollout), servers, rollout) as connection:
            report = pushing.push(connection, version)
        if report.failed:
            return report, float("inf")
        box: list[Any] = [None]
        if made.lead:
            box = [[each for server in servers for each in generated(server, rollout, version)]]
        dist.broadcast_object_list(box, src=0)
        if export:
            made.export(Path(export), torch.float32 if dtype == "fp32" else torch.bfloat16, {})
        return report, _difference(made, box[0])


def generated(server: ServerAddress, rollout: RolloutSettings, version: int) -> list[Response]:
    """What a server answers to `PROMPTS`."""
    with RolloutClient([server], rollout) as client:
        return [each for group in client.generate(PROMPTS, SAMPLING, version) for each in group]


def _difference(made: Session, responses: list[Response]) -> float:
    """Largest absolute difference of log-probabilities of what was sampled."""
    return max(
        abs(ours - theirs)
        for scores, each in zip(scored(made, made.engine.score, responses), responses, strict=True)
        for ours, theirs in zip(scores, each.sampler_logp, strict=True)
    )


def scored(made: Session, score: Callable[..., list[torch.Tensor]], responses: list[Response]) -> list[list[float]]:
    """Log-probabilities of what was sampled, by a trainer; every rank calls it.

    Args:
        score: as `Engine.score`.
    """
    batch = [TokenizedRow(row, each.token_ids, each.token_ids) for row, each in enumerate(responses)]
    micro = jobs.share(made, batch, 2, 1024)
    found: dict[int, list[float]] = {}
    for packed, logp in zip(micro, score(micro), strict=False):
        for row, at in zip(packed.rows_S.tolist(), packed.cu_seqlens_S1.tolist(), strict=False):
            if row >= 0:
                found[row] = logp[at : at + len(batch[row].input_ids) - 1].tolist()
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, found)
    scores = {row: values for each in told for row, values in each.items()}
    assert scores.keys() == set(range(len(responses)))
    return [
        [score for score, label in zip(scores[row], each.labels[1:], strict=True) if label != IGNORE]
        for row, each in enumerate(responses)
    ]


def push_in_small_buckets(
    directory: str, servers: Sequence[ServerAddress], version: int, dtype: str, export: str | None
) -> tuple[SyncReport, float]:
    """As `push`, with buckets smaller than a layer."""
    sender._SMALL_BUCKET = 1  # a model has at least eight buckets
    return push(directory, {}, servers, version, dtype, export, {"dtype": "fp32"})


def push_through_vllm(directory: str, server: ServerAddress, version: int) -> tuple[str, list[list[str]], SyncReport]:
    """As `push`, by vLLM's factory; and the stream through vLLM's own base class.

    Returns:
        the engine's class; names and checksums that the stream yields; the report.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from tests.lib import vllm_trainer

    vllm_trainer.register()
    with jobs.session(directory, {}) as made:
        connection = attach(made.sender(settings()), [server], settings())
        source = vllm_trainer.Source(connection.sender.weights)
        info = vllm_trainer.TrainerInfo(connection, rank=0)
        control = ServerControl(server.url, server.key, 60)
        engine = WeightTransferTrainerFactory.trainer_init(info, client=control, source=source)
        groups = list(source.iter_groups())
        streamed = [pair for names, tensors in groups for pair in zip(names, tensors, strict=True)]
        assert [name for name, _ in streamed] == [meta.name for meta in source.metadata()]
        told = sorted([name, checksum(tensor)] for name, tensor in streamed)
        report = engine.send_weights(version)
        engine.shutdown()
        control.close()
        return type(engine).__name__, told, report


def push_but_fail(directory: str, layout: dict[str, Any], server: ServerAddress, version: int) -> list[str]:
    """As `push`, but the last stage cannot read its second tensor.

    Returns:
        what every rank is told.
    """
    with jobs.session(directory, layout) as made:
        connection = attach(made.sender(settings()), [server], settings())
        if made.topology.last_stage:
            weights = connection.sender.weights
            fill, names = weights.fill, weights.held_names()

            def broken(name: str, *arguments: Any) -> None:
                if name == names[1]:
                    raise RuntimeError("no such memory")
                fill(name, *arguments)

            weights.fill = broken
        try:
            pushing.push(connection, version)
            problems = []
        except UserError as error:
            problems = error.problems
        connection.close()
        return problems
