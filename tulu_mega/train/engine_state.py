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
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories, is_main_replica
from transformers import PretrainedConfig

from tulu_mega.bridge.shards import exportable, global_name
from tulu_mega.distributed.topology import in_its_layout
from tulu_mega.layout.stages import stage_layers
from tulu_mega.model.hf_config import head_dim
from tulu_mega.train.engine import Engine
from tulu_mega.train.optimizer_boxes import FORM, boxes_of
from tulu_mega.train.random_state import Kept, held_state, put_back

Format = Literal["reshardable", "same_layout"]
"""`checkpoint.format` of the settings."""
_METADATA = {"chained_optim_avoid_prefix": True, "singleton_local_shards": False}
_OPTIMIZER = {  # the default names no sharding and megatron-core then fails
    "reshardable": {"distrib_optim_sharding_type": FORM},
    "same_layout": {"distrib_optim_sharding_type": "dp_reshardable"},
}
_BOXES = "optimizer_boxes"
"""Name in a state of what `optimizer_boxes` gives; a checkpoint has its tensors under their own names."""


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


@in_its_layout
def sharded_state(engine: Engine, format: Format, loading: bool) -> dict[str, Any]:
    """Parameters, optimizer and random states as megatron-core saves and loads them. No data are copied."""
    engine.settle()
    model = _model(engine)
    optimizer = _optimizer(engine, format, model, loading)
    return {**model, **optimizer, "rng": held_state(engine.topology, engine.platform.device, "every rank's")}


@in_its_layout
def load_state(engine: Engine, directory: Path, format: Format, random: Kept | None) -> None:
    """Loads what `sharded_state` saved. A collective; raises whatever is wrong with the files.

    Args:
        random: whose random states are there; None leaves this rank's as they are.
    """
    wanted = sharded_state(engine, format, loading=True)
    boxes = _BOXES in wanted
    del wanted["rng"]
    if random:
        wanted["rng"] = held_state(engine.topology, engine.platform.device, random)
    loaded = dist_checkpointing.load(wanted, str(directory))
    for name, chunk in _chunks(engine).items():
        chunk.load_state_dict(loaded[name], strict=engine.lora is None)
    if boxes:  # main parameters and moments were read into their places
        loaded["optimizer"].pop("param_state", None)
    engine.optimizer.load_state_dict(loaded["optimizer"])
    if random:
        put_back(loaded["rng"], engine.platform.device)


@in_its_layout
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
    parameters: frozenset[torch.Tensor]
    """those of this rank that it, or another of its data-parallel ranks, writes; the others are written elsewhere"""


@in_its_layout
def share(engine: Engine, format: Format) -> Share:
    """This rank's share of a checkpoint. No collective: the model may lie on the meta device.

    Weights are written by the first of the ranks that hold the same, the state of a sharded optimizer by those that hold it.

    Args:
        format: of the optimizer's state; an engine without optimizer writes weights alone.
    """
    model = _model(engine)
    described = (held for held in nested_values(model) if isinstance(held, (ShardedTensor, ShardedTensorFactory)))
    parameters = frozenset(held.data for held in described if not any(held.replica_id[:-1]))
    state = {} if engine.optimizer is None else _optimizer(engine, format, model, loading=False)
    return Share(_written(model), sum(held.data.nbytes for held in _written(state)), parameters)


def _optimizer(engine: Engine, format: Format, model: dict[str, Any], loading: bool) -> dict[str, Any]:
    """The optimizer's part of a state.

    Args:
        model: the parameters' part.
    """
    if format == "reshardable" and engine.ddp[0].ddp_config.use_distributed_optimizer:
        (sharded,) = engine.optimizer.chained_optimizers  # dense models have one
        return {
            "optimizer": sharded.state_dict() | {"param_state_sharding_type": FORM},
            _BOXES: boxes_of(sharded, model),
        }
    metadata = _METADATA | _OPTIMIZER[format]
    return {"optimizer": engine.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)}


def _chunks(engine: Engine) -> dict[str, torch.nn.Module]:
    """The rank's model chunks under megatron-core's names; inside, tensors have the same names under every layout."""
    if len(engine.chunks) == 1:
        return {"model": engine.chunks[0]}
    return {f"model{at}": chunk for at, chunk in enumerate(engine.chunks)}


def _model(engine: Engine) -> dict[str, Any]:
    """All parameters, or of a model with adapters those that train: the others are where they were read."""
    described = {name: chunk.sharded_state_dict(metadata=dict(_METADATA)) for name, chunk in _chunks(engine).items()}
    if engine.lora is None:
        return described
    trained = {name: dict(exportable(chunk, adapters=True)) for name, chunk in _chunks(engine).items()}
    return {
        name: {key: value for key, value in held.items() if global_name(_chunks(engine)[name], key) in trained[name]}
        for name, held in described.items()
    }


def _written(state: dict[str, Any]) -> list[ShardedTensor]:
    """The tensors of a state of which this rank is the main replica."""
    apply_factories(state)
    tensors = (held for held in nested_values(state) if isinstance(held, ShardedTensor))
    return [held for held in tensors if is_main_replica(held.replica_id)]
