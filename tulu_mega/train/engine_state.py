"""What of an engine goes into a checkpoint: parameters, optimizer and random states in megatron-core's terms, and what tells one
model and one layout from another."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories, is_main_replica
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from transformers import PretrainedConfig

from tulu_mega.bridge.shards import exportable, global_name
from tulu_mega.layout.optimizer_state import STATE_BYTES
from tulu_mega.layout.stages import stage_layers
from tulu_mega.model.hf_config import head_dim
from tulu_mega.train.engine import Engine

Format = Literal["reshardable", "same_layout"]
"""`checkpoint.format` of the settings."""
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
"""Prefix of the names of tensors that megatron-core gathers for a save."""


def identity(hf: PretrainedConfig) -> dict[str, Any]:
    """The sizes by which one model is told from another."""
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size tie_word_embeddings"
    )
    return {name: getattr(hf, name) for name in names.split()} | {"architectures": hf.architectures, "head_dim": head_dim(hf)}


def layout_of(engine: Engine) -> list[int]:
    """TP, PP, VPP, CP, DP."""
    return list(engine.topology.sizes.values())


def cut_of(engine: Engine) -> dict[str, Any]:
    """What beside the layout decides which rank holds what of the optimizer's state, and in which buckets."""
    ddp = engine.ddp[0].ddp_config
    cut = {
        "layers by pipeline stage": list(stage_layers(engine.hf.to_dict(), engine.settings.parallel)),
        "parallel.distributed_optimizer": ddp.use_distributed_optimizer,
    }
    if ddp.use_distributed_optimizer:
        # what the size comes to: megatron-core's choice depends on the ranks; without overlap all is one bucket
        cut |= {"parallel.overlap_grad_reduce": ddp.overlap_grad_reduce, "parallel.bucket_size": ddp.bucket_size}
    return cut


def changes(engine: Engine, format: Format, held: ShardedTensor) -> bool:
    """Whether training changes a tensor of `sharded_state`: all but those that megatron-core gathered for this save alone."""
    return not (held.key.startswith(_GATHERED) and _gathers(engine, format))


def sharded_state(engine: Engine, format: Format, loading: bool) -> dict[str, Any]:
    """Parameters, optimizer and random states as megatron-core saves and loads them. A collective."""
    engine.settle()
    model = _model(engine)
    optimizer = engine.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_METADATA | _OPTIMIZER[format])
    topology = engine.topology
    rng = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if engine.platform.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state()
    place = (topology.pipeline_rank, topology.tensor_rank)
    shards = (topology.pipeline, topology.tensor)
    return {**model, "optimizer": optimizer, "rng": ShardedObject("rng", rng, shards, place, replica_id=topology.copy)}


def load_state(engine: Engine, directory: Path, format: Format, random: bool) -> None:
    """Loads what `sharded_state` saved. A collective; raises whatever is wrong with the files.

    Args:
        random: whether the random states are loaded too: they belong to ranks of the layout they were drawn under.
    """
    wanted = sharded_state(engine, format, loading=True)
    if not random:
        del wanted["rng"]
    loaded = dist_checkpointing.load(wanted, str(directory))
    for name, chunk in _chunks(engine).items():
        chunk.load_state_dict(loaded[name])
    engine.optimizer.load_state_dict(loaded["optimizer"])
    if "rng" in loaded:
        torch.set_rng_state(loaded["rng"]["cpu"])
        get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])
        if "cuda" in loaded["rng"] and engine.platform.device.type == "cuda":
            torch.cuda.set_rng_state(loaded["rng"]["cuda"])


def load_parameters(engine: Engine, directory: Path, leave: Collection[str]) -> None:
    """Loads the weights alone, of any layout and precision. A collective; raises whatever is wrong with the files.

    Args:
        leave: parameters that stay as they are.
    """
    chunks = _chunks(engine)
    weights = {name: dict(exportable(chunk)) for name, chunk in chunks.items()}
    wanted = {
        name: {
            key: held
            for key, held in chunk.sharded_state_dict(metadata=dict(_METADATA)).items()
            if global_name(chunk, key) in weights[name] and key not in leave
        }
        for name, chunk in chunks.items()
    }
    loaded = dist_checkpointing.load(wanted, str(directory))
    for name, chunk in chunks.items():
        chunk.load_state_dict(loaded[name], strict=False)  # Transformer Engine's extra state is no weight
        for key, parameter in weights[name].items():
            if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                parameter[max(0, engine.hf.vocab_size - engine.topology.tensor_rank * len(parameter)) :].zero_()


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
        format: of the optimizer's state; an engine without optimizer writes weights alone.
    """
    model = _model(engine)
    gathers = engine.optimizer is not None and _gathers(engine, format)
    state = {}
    if engine.optimizer is not None and not gathers:
        state = engine.optimizer.sharded_state_dict(model, is_loading=False, metadata=_METADATA | _OPTIMIZER[format])
    optimizer_bytes, gathered_bytes = sum(held.data.nbytes for held in _written(state)), 0
    weights = _written(model)
    if gathers and engine.topology.first_copy:
        optimizer_bytes = STATE_BYTES * sum(held.data.numel() for held in weights)
        gathered_bytes = STATE_BYTES * sum(buffer.numel_unpadded for ddp in engine.ddp for buffer in ddp.buffers)
    return Share(weights, optimizer_bytes, gathered_bytes)


def _gathers(engine: Engine, format: Format) -> bool:
    """Whether a save gathers the optimizer's state in main memory, on the first rank of each data-parallel group."""
    return format == "reshardable" and engine.ddp[0].ddp_config.use_distributed_optimizer


def _chunks(engine: Engine) -> dict[str, torch.nn.Module]:
    """The rank's model chunks under megatron-core's names; inside, tensors have the same names under every layout."""
    if len(engine.chunks) == 1:
        return {"model": engine.chunks[0]}
    return {f"model{at}": chunk for at, chunk in enumerate(engine.chunks)}


def _model(engine: Engine) -> dict[str, Any]:
    return {name: chunk.sharded_state_dict(metadata=dict(_METADATA)) for name, chunk in _chunks(engine).items()}


def _written(state: dict[str, Any]) -> list[ShardedTensor]:
    """The tensors of a state of which this rank is the main replica."""
    apply_factories(state)
    tensors = (held for held in nested_values(state) if isinstance(held, ShardedTensor))
    return [held for held in tensors if is_main_replica(held.replica_id)]
