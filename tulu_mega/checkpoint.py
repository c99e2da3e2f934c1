"""Checkpoints of a run: megatron-core's distributed checkpoint, made atomic, found again, kept to a number.

A checkpoint is written beside its place and renamed when every byte is on disk, so a crash at any moment leaves the last good
one. `training.json` inside names every file with its size; what does not match is not taken for a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from transformers import PretrainedConfig

from tulu_mega.engine import Engine
from tulu_mega.errors import UserError
from tulu_mega.model.hf_config import head_dim

_NAME = re.compile(r"step_(\d+)")
_MANIFEST = "training.json"
_METADATA = {
    # the default names no sharding and megatron-core then fails; this form can be read under another layout
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    """optimizer steps done"""
    state: dict[str, Any]
    """what the recipe stored beside the model, e.g. counters"""
    model: dict[str, Any]
    """sizes of the model it is of"""
    layout: list[int]
    """TP, PP, CP, DP it was written under"""


def find(directory: Path) -> list[Checkpoint]:
    """Complete checkpoints in a directory, oldest first. Anything torn, foreign or still being written is passed over."""
    found = []
    for path in sorted(directory.glob("step_*")) if directory.is_dir() else []:
        if not _NAME.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads((path / _MANIFEST).read_text())
            if all((path / name).stat().st_size == size for name, size in manifest["files"].items()):
                found.append(Checkpoint(path, manifest["step"], manifest["state"], manifest["model"], manifest["layout"]))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def save(engine: Engine, directory: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint, then removes all but the newest `keep`. Called by every rank.

    Args:
        directory: RUN_DIR/checkpoints, on a file system all ranks share.
        step: optimizer steps done.
        state: small JSON-able extras.

    Raises:
        UserError: when writing fails, e.g. on a full disk; what was there before is untouched.
    """
    final = directory / f"step_{step:08d}"
    partial = directory / _from_rank_0(f"{final.name}.partial-{uuid.uuid4().hex[:8]}")
    lead = dist.get_rank() == 0
    with _together(f"checkpoint of step {step} could not be written to {directory}"):
        if lead:
            clean(directory)
            partial.mkdir(parents=True)
    try:
        with _together(f"checkpoint of step {step} could not be written to {directory}"):
            dist_checkpointing.save(_sharded_state(engine, loading=False), str(partial))
        with _together(f"checkpoint of step {step} could not be written to {directory}"):
            if lead:
                files = {str(p.relative_to(partial)): p.stat().st_size for p in partial.rglob("*") if p.is_file()}
                layout = _layout(engine)
                manifest = {"step": step, "state": state, "model": identity(engine.hf), "layout": layout, "files": files}
                (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
                for path in (*partial.rglob("*"), partial):
                    _to_disk(path)
                if final.exists():  # a step saved twice, by a run that was put back
                    shutil.rmtree(final)
                partial.rename(final)
                _to_disk(directory)
    except UserError:
        if lead:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if lead:
        for old in find(directory)[:-keep]:
            shutil.rmtree(old.path, ignore_errors=True)
    dist.barrier()
    return final


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Loads parameters, optimizer and random states. Called by every rank, after `Engine.prepare_training`.

    Raises:
        UserError: when it is another model's, or cannot be read.
    """
    ours = identity(engine.hf)
    different = [f"{k}: {v} there, {ours.get(k)} here" for k, v in checkpoint.model.items() if ours.get(k) != v]
    if different:
        raise UserError(
            f"{checkpoint.path} is a checkpoint of another model than {engine.settings.model.path} ({'; '.join(different)}); "
            "choose another run_dir or the model it was made from"
        )
    with _together(f"{checkpoint.path} could not be read; remove it to go on from the checkpoint before"):
        wanted = _sharded_state(engine, loading=True)
        if checkpoint.layout != _layout(engine):  # random states belong to ranks of the layout they were drawn under
            del wanted["rng"]
        loaded = dist_checkpointing.load(wanted, str(checkpoint.path))
        engine.model.load_state_dict(loaded["model"])
        engine.optimizer.load_state_dict(loaded["optimizer"])
        if "rng" in loaded:
            torch.set_rng_state(loaded["rng"]["cpu"])
            get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])


def clean(directory: Path) -> None:
    """Removes what saves that did not finish left behind."""
    for left in directory.glob("step_*.partial-*"):
        shutil.rmtree(left, ignore_errors=True)


def identity(hf: PretrainedConfig) -> dict[str, Any]:
    """The sizes by which one model is told from another."""
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size tie_word_embeddings"
    )
    return {name: getattr(hf, name) for name in names.split()} | {"architectures": hf.architectures, "head_dim": head_dim(hf)}


def _layout(engine: Engine) -> list[int]:
    topology = engine.topology
    return [topology.tensor, topology.pipeline, topology.context, topology.data]


def _sharded_state(engine: Engine, loading: bool) -> dict[str, Any]:
    model = engine.model.sharded_state_dict(metadata=dict(_METADATA))
    optimizer = engine.optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(_METADATA))
    topology = engine.topology
    rng = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    place = (topology.pipeline_rank, topology.tensor_rank)
    shards = (topology.pipeline, topology.tensor)
    copy = topology.data_rank * topology.context + topology.context_rank
    return {"model": model, "optimizer": optimizer, "rng": ShardedObject("rng", rng, shards, place, replica_id=copy)}


def _from_rank_0(value: str) -> str:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def _together(what: str) -> Iterator[None]:
    """Makes a failure of any rank a failure of all, told once; nobody waits for a rank that is gone."""
    problem = None
    try:
        yield
    except Exception as error:
        problem = f"{what}: {_reason(error)}"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if found := sorted({p for p in problems if p}):
        raise UserError(found)


def _reason(error: BaseException) -> str:
    """The first cause behind the wrappers that checkpoint libraries put around an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
