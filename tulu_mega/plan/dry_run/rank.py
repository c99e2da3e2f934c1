"""One rank of a world that is not there: its model, gradient buffers and optimizer by megatron-core, on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from tulu_mega.bridge.box import Box
from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.shards import ModelShard, exportable
from tulu_mega.bridge.stream import outgoing
from tulu_mega.config import EngineSettings, RolloutSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.config.workload import Workload
from tulu_mega.distributed import topology
from tulu_mega.distributed.topology import Topology
from tulu_mega.model.quantized import BlockWeight
from tulu_mega.plan.dry_run.record import RankReport, Sending, Shard, Stored, Training
from tulu_mega.platforms import Platform
from tulu_mega.platforms.offload import HostOptimizer
from tulu_mega.train.engine import Engine
from tulu_mega.train.engine_state import share
from tulu_mega.weight_transfer.protocol import SLOTS, Expected
from tulu_mega.weight_transfer.sender import sender_buckets, stream_dtype


@contextlib.contextmanager
def place(settings: EngineSettings, rank: int, world: int, platform: Platform) -> Iterator[Topology]:
    """This process as a rank of a world whose collectives do nothing.

    Args:
        platform: `platforms.meta`'s.
    """
    dist.init_process_group(platform.backend, store=FakeStore(), rank=rank, world_size=world)
    try:
        yield topology.start(settings.parallel, platform, seed=0)
    finally:
        topology.stop()


def report(
    hf: PretrainedConfig,
    settings: EngineSettings,
    here: Topology,
    platform: Platform,
    reward: bool,
    workload: Workload | None,
    lora: LoraSettings | None,
) -> RankReport:
    """What this rank holds, writes and sends.

    Args:
        hf: the model's, of a reward model as it is trained.
        here: of `place`.
        workload: of the stage that trains the model; None where it is not trained.
        lora: adapters that alone are trained then.
    """
    engine = Engine(hf, settings, here, platform, reward=reward, lora=lora)
    layers = tuple(len(chunk.decoder.layers) for chunk in engine.chunks)
    shards, adapters = (_shards(engine, adapters) for adapters in (False, True))
    training, format = None, "reshardable"
    if workload:
        engine.prepare_training(settings.optim, 1, settings.ddp, settings.optimizer)
        format = settings.checkpoint.format
    saved = share(engine, format)
    if workload:
        training = _training(engine, saved.parameters if format == "reshardable" else None)
    stored = tuple(
        Stored(
            held.key,
            tuple(held.global_shape),
            Box(
                (start, start + extent)
                for start, extent in zip(held.global_offset, (1,) * held.prepend_axis_num + tuple(held.local_shape), strict=True)
            ),
        )
        for held in saved.weights
    )
    rollout = workload.rollout if workload else None
    size = sum(shard.nbytes for shard in (adapters if lora else shards))
    return RankReport(
        rank=here.rank,
        stage=here.pipeline_rank,
        tensor_rank=here.tensor_rank,
        copy=here.copy,
        layers=layers,
        shards=shards,
        adapters=adapters if lora else (),
        stored=stored,
        weights_saved=sum(held.data.nbytes for held in saved.weights),
        optimizer_saved=saved.optimizer_bytes,
        beside=size * (2 if lora else 1) if workload and workload.reference else 0,
        training=training,
        sending=_sending(engine, settings.model.dtype, rollout) if rollout else None,
    )


def _shards(engine: Engine, adapters: bool) -> tuple[Shard, ...]:
    """The parameters of a rank's model, or what trains beside them."""
    return tuple(
        Shard(
            name,
            tuple(parameter.shape),
            parameter.itemsize,
            bool(getattr(parameter, "tensor_model_parallel", False)),
            parameter.held_bytes if isinstance(parameter, BlockWeight) else 0,
        )
        for chunk in engine.chunks
        for name, parameter in exportable(chunk, adapters)
    )


def _training(engine: Engine, written: Collection[Tensor] | None) -> Training:
    """From megatron-core's buffers and optimizer.

    Args:
        written: parameters whose state is saved from this rank and its copies, where a save takes it parameter by parameter;
            None where it takes buckets.
    """
    ranks = engine.topology.copies
    buffers = [buffer for ddp in engine.ddp for buffer in ddp.buffers]
    main = sum(parameter.numel() for parameter in engine.optimizer_parameters())
    parts = [part.optimizer for part in engine.optimizer.chained_optimizers]
    on_host = {p for part in parts if isinstance(part, HostOptimizer) for p in part.gpu_params_map_cpu_copy}
    states = [state for part in parts for p, state in part.state.items() if p not in on_host]
    held_apart = [{name: value for name, value in state.items() if name != "master_param"} for state in states]
    moments = [value for state in held_apart for value in state.values() if getattr(value, "ndim", 0)]
    here = main - sum(p.numel() for p in on_host)
    copies = 4 * here if engine.settings.model.dtype == "bf16" else 0  # float32 parameters are their own
    held, saved = [0] * ranks, [0] * ranks
    sharded = engine.ddp[0].ddp_config.use_distributed_optimizer
    for buffer in buffers if sharded else ():
        for bucket in buffer.buckets:
            share = bucket.grad_data.numel() // ranks
            for rank in range(ranks):
                start, stop = bucket.offset + rank * share, bucket.offset + (rank + 1) * share
                inside = {
                    parameter: max(0, min(stop, last) - max(start, first))
                    for parameter, (first, last, at) in buffer.param_index_map.items()
                    if at == bucket.bucket_id
                }
                held[rank] += sum(inside.values())
                if written is None:
                    saved[rank] += max(0, min(stop, bucket.offset + bucket.numel_unpadded) - start)
                else:
                    saved[rank] += sum(elements for parameter, elements in inside.items() if parameter in written)
    return Training(
        sharded=sharded,
        parameter_buffer=sum(buffer.param_data.nbytes for buffer in buffers if buffer.param_data is not None),
        gradient_buffer=sum(buffer.grad_data.nbytes for buffer in buffers),
        slice=sum(buffer.numel for buffer in buffers) // ranks if sharded else main,
        held_D=tuple(held) if sharded else (main,) * ranks,
        saved_D=tuple(saved) if sharded else (main,) + (0,) * (ranks - 1),
        main=main,
        optimizer_bytes=copies + sum(value.nbytes for value in moments),
    )


def _sending(engine: Engine, dtype: str, rollout: RolloutSettings) -> Sending:
    """What a rank of the first copy sends."""
    here, config = engine.topology, engine.hf.to_dict()
    if not here.first_copy:
        return Sending({}, 0, 0, 0)
    kind, fp8 = stream_dtype(dtype, rollout.dtype), rollout.quantization == "fp8"
    out = outgoing(ModelShard(engine.chunks, config, family_for(config), here), kind, fp8)
    if not here.gives_whole_tensors:
        return Sending({}, 0, 0, sum(each.sent[here.tensor_rank] for each in out.values() if here.tensor_rank < len(each.sent)))
    manifest = {name: Expected(each.shape, str(each.dtype).removeprefix("torch."), here.rank) for name, each in out.items()}
    buckets = sender_buckets(here.rank, list(manifest), manifest, rollout.bucket_mib * 2**20)
    buffers = SLOTS * max(bucket.nbytes for bucket in buckets)
    return Sending({name: each.nbytes for name, each in manifest.items()}, len(buckets), buffers, 0)
