"""What every rank's memory holds at its fullest, by part, in bytes.

Weights, gradients and optimizer: mixed precision with a distributed optimizer, 2 + 4 + 12 / (DP x CP) bytes a parameter (ZeRO
stage 1, Rajbhandari et al., arXiv 1910.02054; megatron-core's docs/source/api-guide/dist_optimizer.md has the same table).

Where adapters train beside frozen weights, only they and a reward model's head have gradients and optimizer.

Activations: `kept` has what a layer keeps of a token, tensor by tensor. With everything fused and nothing recomputed it is, by
Transformer Engine's layers in bf16, after Korthikanti et al. (arXiv 2205.05198), who count 34 h for a GPT under tensor and
sequence parallelism with attention that keeps no scores,

    (4 h + 2 q + 2 k + 3 f) x 2 + 4 heads + 8  input, normed input, second residual, its norm; q, k, v; attention's result;
                                               gate and up, their product; one float a head of attention's softmax and
                                               one of each norm

over t (under sequence parallelism; else only q, k, f and heads are) and CP. A layer that is recomputed whole keeps its input
only, and one layer's whole activations are there at a time. How many micro-batches are kept at once is read off the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

from tulu_mega.layout.optimizer_state import PIECE
from tulu_mega.layout.schedule import peak_held
from tulu_mega.plan.model.job import Job
from tulu_mega.plan.model.kept import token_bytes
from tulu_mega.weight_transfer.slots import SLOTS

GROUPS = 3 * 2**29
"""Bytes of NCCL's buffers for about ten groups. An estimate, not measured here."""
RESERVED = 3 * 2**29 + GROUPS
"""Bytes beside torch's allocations: the CUDA context and its modules (0.5 GiB), NCCL's buffers for about ten groups, cuBLAS' and
Transformer Engine's workspaces. An estimate, not measured here."""
UNUSABLE = 0.05
"""Share of what comes and goes that the caching allocator reserves beyond what is allocated, with expandable segments. An
estimate, not measured here: packs of every step have other lengths; without such segments it is several times that."""
LOGITS = 512 * 2**20
"""Bytes of float32 logits that the log-prob step makes at a time, as `logprobs` does."""
_WRITING = 6 * 2**20
"""Bytes that a rank writes or reads a checkpoint with, beside what passes through, by `tools/bench_save.py`."""


@dataclass(frozen=True)
class RankMemory:
    """A pipeline rank's memory, the same on all its tensor, context and data-parallel ranks but for `sync`."""

    rank: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """that wait for their backward pass"""
    working: float
    """of the layer that is computed, beside these"""
    log_probs: float
    """head and log-probabilities, on the last stage"""
    pipeline: float
    """hidden states and gradients on their way between stages"""
    outputs: float
    """stages' results that stay until their backward pass, unless they are given back once sent"""
    communication: float
    """tensor-parallel gathers; the layers that FSDP has gathered"""
    beside: float
    """weights of further models of the same size: the reference of a policy; of adapters, those that a run began with"""
    sync: float
    """buckets of weights on their way to servers, on tensor rank 0 of the first replica"""
    allocator: float
    """reserved over allocated"""
    reserved: float = RESERVED
    value: float = 0.0
    """weights, gradients and optimizer of a value model that trains beside, and NCCL's buffers for groups of its own"""
    value_passes: float = 0.0
    """what its passes take above the policy's, in whose place they come"""
    rewards: float = 0.0
    """weights of a reward model that scores responses"""

    @property
    def parts(self) -> dict[str, float]:
        """By name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "rank"}

    @property
    def held(self) -> float:
        """What a model that trains takes all the time."""
        return self.weights + self.gradients + self.optimizer

    @property
    def passing(self) -> float:
        """What comes and goes with its passes."""
        return self.activations + self.working + self.log_probs + self.pipeline + self.outputs + self.communication

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())


def rank_memory(job: Job, rank: int, beside: int = 0, bucket: int = 0, copies: int = 0) -> RankMemory:
    """The memory of a pipeline rank.

    Args:
        rank: in the pipeline, from 0.
        beside: models that lie on the same ranks and are only scored with.
        bucket: bytes of a bucket of weights, 0 without servers.
        copies: times that what trains is held once more.

    Raises:
        ValueError: the interleaved schedule cannot run that number of micro-batches.
    """
    parallel, held, trained = job.parallel, job.held[rank], job.trained[rank]
    sharded = job.data if job.fsdp else 1
    shards = job.shards if parallel.distributed_optimizer else 1
    weights = (held.total + job.adapters[rank]) * job.itemsize
    if job.blocks:
        weights += held.layers * (job.blocks - job.itemsize)
    if job.fp8_weights:  # a byte, and a transposed one that Hopper's products want
        weights += held.layers * (2 - job.itemsize)
    elif job.fp8:  # cast once a step, beside the parameters
        weights += 2 * held.layers
    left, everything, inputs = token_bytes(job)
    item, size = job.itemsize, job.size
    last = rank == parallel.pipeline - 1
    stages = list(zip(job.layers, job.whole, strict=True))
    by_stage = [whole * inputs + (layers - whole) * left for layers, whole in stages]
    tallest = outputs = 0.0
    for packs in set(job.packs):
        held_by = (parallel.pipeline, parallel.virtual_pipeline)
        tallest = max(tallest, peak_held(rank, *held_by, [[pack.tokens * each for each in by_stage] for pack in packs]))
        if parallel.pipeline > 1 and not job.kernels.deallocate:
            sent = [[pack.tokens * inputs] * (len(stages) - 1) + [0.0] for pack in packs]
            outputs = max(outputs, peak_held(rank, *held_by, sent))
    tokens = job.longest
    hidden = tokens / parallel.context * size.hidden * item
    # gradients of gate, up and product, and of the layer's ends; of a module that is computed again what it made
    grown = item * (3 * size.ffn / parallel.tensor + 2 * size.hidden / (parallel.tensor if job.sequence else 1))
    again = everything if any(job.whole) else everything - left
    made = RankMemory(
        rank=rank,
        weights=weights / sharded,
        gradients=trained * job.grad_bytes / sharded,
        optimizer=trained * (job.state_bytes * (1 - job.host_share) + _copies(job)) / shards,
        activations=tallest,
        working=tokens * (again + (grown + job.adapter_work.deltas) / parallel.context) + job.made_whole,
        log_probs=_head_bytes(job) if last else 0.0,
        pipeline=4 * hidden / (parallel.tensor if job.sequence else 1) if parallel.pipeline > 1 else 0.0,
        outputs=outputs,
        communication=(2 * hidden if job.sequence else 0.0) + _gathered(job, rank),
        beside=(beside * held.total + copies * trained) * item,
        sync=SLOTS * max(bucket, _largest(job, rank) * item) if bucket else 0.0,
        allocator=0.0,
    )
    return replace(made, allocator=UNUSABLE * made.passing)


def memory_by_rank(job: Job, beside: int = 0, bucket: int = 0, copies: int = 0) -> list[RankMemory]:
    """Of every pipeline rank. Arguments and errors of :func:`rank_memory`."""
    return [rank_memory(job, rank, beside, bucket, copies) for rank in range(job.parallel.pipeline)]


def beside_a_value_model(
    policy: Sequence[RankMemory], value: Sequence[Collection[RankMemory]], groups: bool = False
) -> list[RankMemory]:
    """The policy's pipeline ranks with what the value model takes there. The two pass in turn, so what comes and goes is there
    once, as large as the larger needs it.

    Args:
        value: for each of them, the value model's pipeline ranks, each by itself, that lie on the same GPUs.
        groups: whether it has groups of its own.
    """
    made = []
    for own, others in zip(policy, value, strict=True):
        held = max(each.held for each in others) + GROUPS * groups
        passing = max(each.passing for each in others)
        more = max(0.0, passing - own.passing)
        made.append(replace(own, value=held, value_passes=more, allocator=UNUSABLE * (own.passing + more)))
    return made


def checkpoint_host_bytes(job: Job, format: str, asynchronous: bool) -> float:
    """Main memory that a save takes on the fullest node, beside what its ranks hold.

    Each rank writes what it holds, piece after piece. Asynchronously its state is copied before: its share of main parameters
    and moments, and on the first of the data-parallel ranks the weights. Of the form `reshardable`, weights of which a rank has
    the whole main parameter are rounded from that when they are written.

    Args:
        format, asynchronous: `checkpoint`'s settings.
    """
    per_node = min(job.gpu.per_node, job.world)
    passing = per_node * max(_passing(job, rank) for rank in range(job.parallel.pipeline))
    if not asynchronous:
        return passing
    held = max(job.trained)
    firsts = min(per_node, job.parallel.tensor * max(1, per_node // (job.parallel.tensor * job.shards)))  # copies come after them
    if not job.parallel.distributed_optimizer:  # these write all of it; of float32 parameters there is no other main one
        return passing + firsts * held * (job.state_bytes + job.itemsize)
    copied = 1.0 if format == "same_layout" else 1 - 1 / job.shards
    return passing + held * (per_node * job.state_bytes / job.shards + firsts * job.itemsize * copied)


def together_host_bytes(jobs: Sequence[Job], format: str, asynchronous: bool) -> float:
    """The same of models that one checkpoint has: they are written one after another, and copied all at once."""
    passing = [min(job.gpu.per_node, job.world) * max(map(partial(_passing, job), range(job.parallel.pipeline))) for job in jobs]
    copies = [checkpoint_host_bytes(job, format, asynchronous) - own for job, own in zip(jobs, passing, strict=True)]
    return max(passing) + sum(copies)


def resume_host_bytes(job: Job) -> float:
    """Main memory that reading a checkpoint takes on the fullest node, beside what its ranks hold: two pieces at a time, as they
    were written; what belongs to the rank is copied to its place."""
    return 2 * min(job.gpu.per_node, job.world) * max(_passing(job, rank) for rank in range(job.parallel.pipeline))


def _passing(job: Job, rank: int) -> float:
    """Bytes of main memory through which a rank's part of a checkpoint goes: a piece of the optimizer's largest tensor at a time,
    or a weight."""
    held, size = job.held[rank], job.size
    if job.lora:
        largest = max((shard.count for layer in job.adapters_by_layer for shard in layer), default=0)
        return _WRITING + max(4 * largest / math.ceil(max(1, largest) / PIECE), job.itemsize * largest)
    layers = size.hidden * max(size.ffn, size.queries + 2 * size.keys) // job.parallel.tensor
    largest = max(held.embedding, held.head, layers)
    return _WRITING + max(4 * largest / math.ceil(largest / PIECE), job.itemsize * largest)


def state_host_bytes(job: Job) -> float:
    """Main memory that the optimizer's state takes on the fullest node all along, and float32 gradients beside it."""
    held = max(job.trained)
    return min(job.gpu.per_node, job.world) * held * job.host_share * (job.state_bytes + 4) / job.shards


def _copies(job: Job) -> float:
    """Bytes a parameter of float32 gradients that megatron-core's distributed optimizer makes of a rank's share of bf16 ones."""
    if job.grad_bytes != 2 or job.dtype != "bf16":
        return 0
    return 4 * (1 - job.host_share) if job.host_share else 4 * job.grad_copies


def _head_bytes(job: Job) -> float:
    """Of the last stage beside its layers: hidden states gathered over tensor ranks and their gradient, logits, and the head's
    gradient in float32 and cast where logits come in chunks."""
    size, tensor = job.size, job.parallel.tensor
    pack = max((pack for packs in job.packs for pack in packs), key=lambda pack: (pack.tokens, pack.labelled))
    tokens, labelled = pack.tokens / job.parallel.context, pack.labelled / job.parallel.context
    if size.columns == 1:
        return 2 * 4 * tokens * size.hidden / (tensor if job.sequence else 1)
    columns = size.columns / tensor
    if job.full_logits:
        return 2 * tokens * size.hidden * job.itemsize + labelled * columns * 2 * job.itemsize
    chunks = labelled * columns * 4 / LOGITS
    logits = min(1.0, chunks) * LOGITS * (3.5 if job.entropy else 2.5)
    gradient = 0 if job.lora else columns * size.hidden * (job.itemsize + (4 if chunks > 1 else 0))
    return 2 * (tokens + labelled) * size.hidden * job.itemsize + logits + gradient


def _gathered(job: Job, rank: int) -> float:
    """FSDP: two layers' weights and gradients at a time, and the embedding's or the head's, whichever is larger."""
    if not job.fsdp:
        return 0.0
    held = job.held[rank]
    layers = sum(job.layers[rank :: job.parallel.pipeline])
    return (2 * held.layers / layers + max(held.embedding, held.head)) * (job.itemsize + job.grad_bytes)


def _largest(job: Job, rank: int) -> float:
    """Elements of a stage's largest Hugging Face tensor, which has a bucket of its own."""
    held = job.held[rank]
    ends = max(held.embedding, held.head) * job.parallel.tensor
    return max(ends, job.size.hidden * max(job.size.ffn, job.size.queries))
