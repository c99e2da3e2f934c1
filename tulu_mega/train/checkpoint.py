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
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories, is_main_replica
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from transformers import PretrainedConfig

from tulu_mega.bridge.rules import is_weight
from tulu_mega.distributed.collectives import from_lead, together
from tulu_mega.errors import UserError
from tulu_mega.layout.stages import stage_layers
from tulu_mega.model.hf_config import head_dim
from tulu_mega.train.engine import Engine
from tulu_mega.train.sharded_save import ShardedSave

_NAME = re.compile(r"step_(\d+)")
_MANIFEST = "training.json"
Format = Literal["reshardable", "same_layout"]
_METADATA = {"chained_optim_avoid_prefix": True, "singleton_local_shards": False}
_OPTIMIZER = {  # the default names no sharding and megatron-core then fails
    # gathered on one rank of each data-parallel group in main memory, never on a GPU or on all ranks
    "reshardable": {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
    },
    "same_layout": {"distrib_optim_sharding_type": "dp_reshardable"},
}
_GATHERED = "optimizer.state."
"""How the names of what is gathered begin."""
_STATE_BYTES = 12
"""of a parameter's float32 main parameter and two moments"""


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
    """TP, PP, VPP, CP, DP it was written under"""
    format: Format
    """of the optimizer's state"""
    cut: dict[str, Any]
    """what else decides where that state lies in a checkpoint of the same layout, by name; empty in those of the first version"""


def find(directory: Path) -> list[Checkpoint]:
    """Complete checkpoints in a directory, oldest first. Anything torn, foreign or still being written is passed over."""
    found = []
    for path in sorted(directory.glob("step_*")) if directory.is_dir() else []:
        if not _NAME.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads((path / _MANIFEST).read_text())
            if all((path / name).stat().st_size == size for name, size in manifest["files"].items()):
                known = (manifest[name] for name in ("step", "state", "model", "layout", "format"))
                found.append(Checkpoint(path, *known, manifest.get("cut", {})))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def save(engine: Engine, directory: Path, step: int, state: dict[str, Any], keep: int, format: Format = "reshardable") -> Path:
    """Writes a checkpoint, then removes all but the newest `keep`. Called by every rank.

    Args:
        directory: RUN_DIR/checkpoints, on a file system all ranks share.
        step: optimizer steps done.
        state: small JSON-able extras.
        format: `checkpoint.format` of the settings.

    Raises:
        UserError: when writing fails, e.g. on a full disk; what was there before is untouched.
    """
    saver = Saver(engine, directory, keep, format, asynchronous=False)
    saver.save(step, state)
    return directory / _name(step)


class Saver:
    """A run's saves, one at a time. Every rank calls every method, in the same order.

    Asynchronously, a save copies what it will write into main memory and leaves the writing to a thread; the checkpoint has its
    name, and counts, only when every rank has written, which :meth:`poll` finds out. A crash before that leaves the one before.

    Args:
        engine: whose state.
        directory, keep, format: as for :func:`save`.
        asynchronous: whether training goes on while files are written.
    """

    def __init__(self, engine: Engine, directory: Path, keep: int, format: Format, asynchronous: bool):
        self._engine, self._directory, self._keep, self._format = engine, directory, keep, format
        device = engine.platform.device  # a new thread's is GPU 0, on which every rank of the machine would take memory
        start = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", **start) if asynchronous else None
        self._pending: _Pending | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Saves, or begins to, after the save before has ended.

        Raises:
            UserError: on every rank, when this save (or, asynchronously, the one before) fails; earlier ones are untouched.
        """
        self.finish()
        self._engine.at("checkpoint")
        engine, directory = self._engine, self._directory
        partial = directory / from_lead(f"{_name(step)}.partial-{uuid.uuid4().hex[:8]}")
        what = f"checkpoint of step {step} could not be written to {directory}"
        with together(what):
            if dist.get_rank() == 0:
                clean(directory)
                partial.mkdir(parents=True)
        manifest = {
            "step": step,
            "state": state,
            "model": identity(engine.hf),
            "layout": _layout(engine),
            "format": self._format,
            "cut": _cut(engine),
        }
        try:
            content = _sharded_state(engine, self._format, loading=False)
            sharded = ShardedSave(content, partial, what, self._changes if self._thread else None)
        except UserError:
            _discard(partial)
            raise
        self._pending = _Pending(sharded, partial, what, manifest)
        if self._thread:
            self._pending.writing = self._thread.submit(sharded.write)
        else:
            self.finish()

    def _changes(self, held: ShardedTensor) -> bool:
        """All does while training goes on, but what megatron-core gathered for this save alone."""
        return not (held.key.startswith(_GATHERED) and _gathers(self._engine, self._format))

    def poll(self) -> None:
        """Ends the save under way if every rank has written; never waits for a disk. Raises as `save`."""
        if self._pending and self._pending.writing:
            done = torch.tensor(int(self._pending.writing.done()), device=self._engine.platform.device)
            dist.all_reduce(done, dist.ReduceOp.MIN)
            if done.item():
                self.finish()

    def finish(self) -> None:
        """Ends the save under way, if there is one, waiting for every rank. Raises as `save`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self._engine.at("checkpoint")
        failure = None
        try:
            pending.writing.result() if pending.writing else pending.sharded.write()
        except Exception as error:
            failure = error
        try:
            pending.sharded.finish(failure)
            with together(pending.what):
                if dist.get_rank() == 0:
                    _put_in_place(pending.partial, self._directory / _name(pending.manifest["step"]), pending.manifest)
        except UserError:
            _discard(pending.partial)
            raise
        if dist.get_rank() == 0:
            for old in find(self._directory)[: -self._keep]:
                shutil.rmtree(old.path, ignore_errors=True)
        dist.barrier()


@dataclass
class _Pending:
    """A save that has begun."""

    sharded: ShardedSave
    partial: Path
    what: str
    manifest: dict[str, Any]
    writing: Future[None] | None = None


def _put_in_place(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """The complete directory, all of it on disk, takes its name."""
    files = {str(p.relative_to(partial)): p.stat().st_size for p in partial.rglob("*") if p.is_file()}
    (partial / _MANIFEST).write_text(json.dumps(manifest | {"files": files}, indent=1))
    for path in (*partial.rglob("*"), partial):
        _to_disk(path)
    if final.exists():  # a step saved twice, by a run that was put back
        shutil.rmtree(final)
    partial.rename(final)
    _to_disk(final.parent)


def _discard(partial: Path) -> None:
    """What a failed save has written goes; nobody looks before it is gone."""
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Loads parameters, optimizer and random states. Called by every rank, after `Engine.prepare_training`.

    Raises:
        UserError: when it is another model's, is of the form of another layout than this run's, or cannot be read.
    """
    ours = identity(engine.hf)
    different = [f"{k}: {v} there, {ours.get(k)} here" for k, v in checkpoint.model.items() if ours.get(k) != v]
    if different:
        raise UserError(
            f"{checkpoint.path} is a checkpoint of another model than {engine.settings.model.path} ({'; '.join(different)}); "
            "choose another run_dir or the model it was made from"
        )
    if checkpoint.format == "same_layout":
        _check_same_layout(engine, checkpoint)
    with together(f"{checkpoint.path} could not be read; remove it to go on from the checkpoint before"), torch.no_grad():
        wanted = _sharded_state(engine, checkpoint.format, loading=True)
        if checkpoint.layout != _layout(engine):  # random states belong to ranks of the layout they were drawn under
            del wanted["rng"]
        loaded = dist_checkpointing.load(wanted, str(checkpoint.path))
        for name, chunk in _chunks(engine).items():
            chunk.load_state_dict(loaded[name])
        engine.optimizer.load_state_dict(loaded["optimizer"])
        if "rng" in loaded:
            torch.set_rng_state(loaded["rng"]["cpu"])
            get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])
            if "cuda" in loaded["rng"] and engine.platform.device.type == "cuda":
                torch.cuda.set_rng_state(loaded["rng"]["cuda"])


def load_weights(engine: Engine, directory: Path, leave: Collection[str] = ()) -> None:
    """Loads parameters alone from a Megatron distributed checkpoint of any layout and precision. Called by every rank.

    Rows that pad the vocabulary become zero.

    Args:
        leave: parameters that stay as they are.

    Raises:
        UserError: on every rank, when a tensor is missing or cannot be read.
    """
    with together(f"{directory} could not be read"), torch.no_grad():
        wanted = {
            name: {
                key: held
                for key, held in chunk.sharded_state_dict(metadata=dict(_METADATA)).items()
                if is_weight(key) and key not in leave
            }
            for name, chunk in _chunks(engine).items()
        }
        loaded = dist_checkpointing.load(wanted, str(directory))
        for name, chunk in _chunks(engine).items():
            chunk.load_state_dict(loaded[name], strict=False)  # Transformer Engine's extra state is no weight
            for key, parameter in chunk.named_parameters():
                if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                    parameter[max(0, engine.hf.vocab_size - engine.topology.tensor_rank * len(parameter)) :].zero_()


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
    chunks = engine.settings.parallel.virtual_pipeline
    return [topology.tensor, topology.pipeline, chunks, topology.context, topology.data]


def _cut(engine: Engine) -> dict[str, Any]:
    """What else decides which rank holds what of the optimizer's state, and in which buckets."""
    ddp = engine.ddp[0].ddp_config
    cut = {
        "layers by pipeline stage": list(stage_layers(engine.hf.to_dict(), engine.settings.parallel)),
        "parallel.distributed_optimizer": ddp.use_distributed_optimizer,
    }
    if ddp.use_distributed_optimizer:
        # what the size comes to: megatron-core's choice depends on the ranks; without overlap all is one bucket
        cut |= {"parallel.overlap_grad_reduce": ddp.overlap_grad_reduce, "parallel.bucket_size": ddp.bucket_size}
    return cut


def _check_same_layout(engine: Engine, checkpoint: Checkpoint) -> None:
    there, here = checkpoint.layout, _layout(engine)
    cut = _cut(engine)
    changed = [f"{name} was {was!r}, is {cut.get(name)!r}" for name, was in checkpoint.cut.items() if cut.get(name) != was]
    if there[:4] == here[:4] and not changed:  # the data-parallel ranks may be others
        return
    raise UserError(
        f"{checkpoint.path} was written with checkpoint.format = 'same_layout' under {_spelt(there)}, this run is {_spelt(here)}"
        f"{''.join(f'; {each}' for each in changed)}; resume as it was, or save once with checkpoint.format = 'reshardable' there"
    )


def _gathers(engine: Engine, format: Format) -> bool:
    """Whether a save gathers the optimizer's state in main memory, on the first rank of each data-parallel group."""
    return format == "reshardable" and engine.ddp[0].ddp_config.use_distributed_optimizer


def _chunks(engine: Engine) -> dict[str, torch.nn.Module]:
    """The rank's model chunks under megatron-core's names; inside, tensors have the same names under every layout."""
    if len(engine.chunks) == 1:
        return {"model": engine.chunks[0]}
    return {f"model{at}": chunk for at, chunk in enumerate(engine.chunks)}


def _sharded_state(engine: Engine, format: Format, loading: bool) -> dict[str, Any]:
    engine.settle()
    model = {name: chunk.sharded_state_dict(metadata=dict(_METADATA)) for name, chunk in _chunks(engine).items()}
    optimizer = engine.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_METADATA | _OPTIMIZER[format])
    topology = engine.topology
    rng = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if engine.platform.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state()
    place = (topology.pipeline_rank, topology.tensor_rank)
    shards = (topology.pipeline, topology.tensor)
    copy = topology.data_rank * topology.context + topology.context_rank
    return {**model, "optimizer": optimizer, "rng": ShardedObject("rng", rng, shards, place, replica_id=copy)}


@dataclass(frozen=True)
class Share:
    """What a rank writes at a save, known without saving."""

    weights: list[ShardedTensor]
    optimizer_bytes: int
    gathered_bytes: int
    """main memory that gathering the optimizer's state takes on this rank, in which it stays until it is written"""


def share(engine: Engine, format: Format) -> Share:
    """This rank's share of a checkpoint. No collective: the model may lie on the meta device.

    Weights are written by the first of the ranks that hold the same. So is, of a sharded optimizer, the state in the form
    "reshardable", which is not asked of megatron-core here, because it would gather it: a main parameter and two moments for each
    parameter, in float32, of those whose weights the rank writes.

    Args:
        format: `checkpoint.format` of the settings. An engine without optimizer writes weights alone.
    """
    model = {name: chunk.sharded_state_dict(metadata=dict(_METADATA)) for name, chunk in _chunks(engine).items()}
    gathers = engine.optimizer is not None and _gathers(engine, format)
    state = {}
    if engine.optimizer is not None and not gathers:
        state = engine.optimizer.sharded_state_dict(model, is_loading=False, metadata=_METADATA | _OPTIMIZER[format])
    optimizer_bytes, gathered_bytes = sum(held.data.nbytes for held in _written(state)), 0
    weights = _written(model)
    if gathers and dist.get_rank(engine.topology.data_context_group) == 0:
        optimizer_bytes = _STATE_BYTES * sum(held.data.numel() for held in weights)
        gathered_bytes = _STATE_BYTES * sum(buffer.numel_unpadded for ddp in engine.ddp for buffer in ddp.buffers)
    return Share(weights, optimizer_bytes, gathered_bytes)


def _written(state: dict[str, Any]) -> list[ShardedTensor]:
    """Its tensors of which this rank is the main replica."""
    apply_factories(state)
    tensors = (held for held in nested_values(state) if isinstance(held, ShardedTensor))
    return [held for held in tensors if is_main_replica(held.replica_id)]


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _spelt(layout: list[int]) -> str:
    return " x ".join(f"{axis}{size}" for axis, size in zip(("TP", "PP", "VPP", "CP", "DP"), layout, strict=True))


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
