"""What ranks do for the dry run's tests."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.lib import jobs
from tests.lib.checkpoints import save
from tulu_mega.bridge.shards import exportable
from tulu_mega.bridge.stream import LiveWeights
from tulu_mega.config import OptimSettings
from tulu_mega.config.lora import LoraSettings


def dry(directory: str) -> None:
    """Does the dry run's job in this process, which is a fork."""
    import importlib

    importlib.import_module("tulu_mega.plan.dry_run.__main__").main(Path(directory))


def real(
    model: str, layout: dict[str, Any], dtype: str, format: str, checkpoints: str, lora: LoraSettings | None = None
) -> dict[str, Any]:
    """What a rank of a true world holds, sends and, after a save, has written."""
    with jobs.session(model, layout, dtype, load=False, lora=lora) as made:
        engine, place = made.engine, made.topology
        for chunk in engine.chunks:
            for parameter in chunk.parameters():
                parameter.data.zero_()
        shards, adapters = (
            [
                (name, tuple(parameter.shape), bool(getattr(parameter, "tensor_model_parallel", False)))
                for chunk in engine.chunks
                for name, parameter in exportable(chunk, kind)
            ]
            for kind in (False, True)
        )
        engine.prepare_training(OptimSettings(), 1)
        path = save(engine, Path(checkpoints), 1, {}, keep=1, format=format)
        sent = {}
        if not place.data_rank and not place.context_rank:
            weights = LiveWeights(made.shard(engine.hf.to_dict()), torch.float32)
            sizes = {meta.name: 4 * torch.Size(meta.shape).numel() for meta in weights.metadata()}
            sent = {name: sizes[name] for name in weights.held_names()}
        states = [value for part in engine.optimizer.chained_optimizers for value in part.optimizer.state.values()]
        moments = [each for state in states for each in state.values() if getattr(each, "ndim", 0)]
        return {
            "rank": place.rank,
            "shards": shards,
            "adapters": adapters if lora else [],
            "bytes": sum(each.nbytes for chunk in engine.chunks for each in chunk.parameters()),
            "gradients": sum(buffer.grad_data.nbytes for ddp in engine.ddp for buffer in ddp.buffers),
            "main": sum(parameter.numel() for parameter in engine.optimizer_parameters()),
            "moments": sum(each.nbytes for each in moments),
            "sent": sent,
            "written": _written(path)[place.rank],
        }


def _written(path: Path) -> dict[int, int]:
    """Bytes of tensors in each rank's files of a checkpoint."""
    metadata = FileSystemReader(path).read_metadata()
    sizes: dict[int, int] = defaultdict(int)
    for index, stored in metadata.storage_data.items():
        held = metadata.state_dict_metadata[index.fqn]
        if index.offset is None or not hasattr(held, "chunks"):
            continue  # no tensor
        (chunk,) = [each for each in held.chunks if each.offsets == index.offset]
        rank = int(stored.relative_path.removeprefix("__").partition("_")[0])
        sizes[rank] += chunk.sizes.numel() * held.properties.dtype.itemsize
    return sizes
