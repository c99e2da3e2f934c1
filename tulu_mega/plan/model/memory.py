"""What every rank's memory holds at its fullest, by part, in bytes.

Weights, gradients and optimizer: mixed precision with a distributed optimizer, 2 + 4 + 12 / (DP x CP) bytes a parameter (ZeRO
stage 1, Rajbhandari et al., arXiv 1910.02054; megatron-core's docs/source/api-guide/dist_optimizer.md has the same table).

Activations a layer keeps for its backward pass, in bytes a token; Korthikanti et al. (arXiv 2205.05198) count 34 h for a GPT
under tensor and sequence parallelism with attention that keeps no scores. With two norms, SwiGLU and grouped keys it is, by
Transformer Engine's layers in bf16:

    (4 h + 2 q + 2 k + 3 f) x 2 + 4 heads      input, normed input, second residual, its norm; q, k, v; attention's result;
                                               gate and up, their product; one float a head of attention's softmax

over t (under sequence parallelism; else only q, k, f and heads are) and CP. FP8 keeps normed inputs and the product in one
byte, and one more byte of attention's result. `recompute = "full"` keeps a layer's input only, and one layer's whole activations
at a time. How many micro-batches are kept at once is read off the schedule's order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from tulu_mega.layout.optimizer_state import PIECE, STATE_BYTES
from tulu_mega.layout.schedule import peak_held
from tulu_mega.plan.model.job import Job
from tulu_mega.weight_transfer.slots import SLOTS

RESERVED = 3 * 2**30
"""Bytes beside torch's allocations: the CUDA context and its modules (0.5 GiB), NCCL's buffers for about ten groups (1.5 GiB),
cuBLAS' and Transformer Engine's workspaces, and what the allocator cannot use. An estimate, not measured here."""
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
    communication: float
    """tensor-parallel gathers; the layers that FSDP has gathered"""
    beside: float
    """weights of further models: the reference of a policy, a reward model"""
    sync: float
    """buckets of weights on their way to servers, on tensor rank 0 of the first replica"""
    reserved: float = RESERVED

    @property
    def parts(self) -> dict[str, float]:
        """By name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "rank"}

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())


def rank_memory(job: Job, rank: int, beside: int = 0, bucket: int = 0) -> RankMemory:
    """The memory of a pipeline rank.

    Args:
        rank: in the pipeline, from 0.
        beside: models that lie on the same ranks and are only scored with.
        bucket: bytes of a bucket of weights, 0 without servers.

    Raises:
        ValueError: the interleaved schedule cannot run that number of micro-batches.
    """
    parallel, held = job.parallel, job.held[rank]
    sharded = job.data if job.fsdp else 1
    shards = job.shards if parallel.distributed_optimizer else 1
    weights = held.total * job.itemsize
    if job.fp8_weights:  # a byte, and a transposed one that Hopper's products want
        weights += held.layers * (2 - job.itemsize)
    elif job.fp8:  # cast once a step, beside the parameters
        weights += 2 * held.layers
    each = _layer_bytes(job)
    last = rank == parallel.pipeline - 1
    tallest = 0.0
    for packs in set(job.packs):
        kept = [[pack.tokens * each.kept * layers for layers in job.layers] for pack in packs]
        tallest = max(tallest, peak_held(rank, parallel.pipeline, parallel.virtual_pipeline, kept))
    tokens = job.longest
    hidden = tokens / parallel.context * job.size.hidden * job.itemsize
    return RankMemory(
        rank=rank,
        weights=weights / sharded,
        gradients=held.total * job.grad_bytes / sharded,
        optimizer=held.total * (STATE_BYTES if job.dtype == "bf16" else 8) / shards,
        activations=tallest,
        working=tokens * each.working,
        log_probs=_head_bytes(job) if last else 0.0,
        pipeline=4 * hidden / (parallel.tensor if job.sequence else 1) if parallel.pipeline > 1 else 0.0,
        communication=(2 * hidden if job.sequence else 0.0) + _gathered(job, rank),
        beside=beside * held.total * job.itemsize,
        sync=SLOTS * max(bucket, _largest(job, rank) * job.itemsize) if bucket else 0.0,
    )


def memory_by_rank(job: Job, beside: int = 0, bucket: int = 0) -> list[RankMemory]:
    """Of every pipeline rank. Arguments and errors of :func:`rank_memory`."""
    return [rank_memory(job, rank, beside, bucket) for rank in range(job.parallel.pipeline)]


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
    held = max(each.total for each in job.held)
    firsts = min(per_node, job.parallel.tensor * max(1, per_node // (job.parallel.tensor * job.shards)))  # copies come after them
    if not job.parallel.distributed_optimizer:  # these write all of it; of float32 parameters there is no other main one
        return passing + firsts * held * ((STATE_BYTES if job.dtype == "bf16" else 8) + job.itemsize)
    copied = 1.0 if format == "same_layout" else 1 - 1 / job.shards
    return passing + held * (per_node * STATE_BYTES / job.shards + firsts * job.itemsize * copied)


def resume_host_bytes(job: Job) -> float:
    """Main memory that reading a checkpoint takes on the fullest node, beside what its ranks hold: two pieces at a time, as they
    were written; what belongs to the rank is copied to its place."""
    return 2 * min(job.gpu.per_node, job.world) * max(_passing(job, rank) for rank in range(job.parallel.pipeline))


def _passing(job: Job, rank: int) -> float:
    """Bytes of main memory through which a rank's part of a checkpoint goes: a piece of the optimizer's largest tensor at a time,
    or a weight."""
    held, size = job.held[rank], job.size
    layers = size.hidden * max(size.ffn, size.queries + 2 * size.keys) // job.parallel.tensor
    largest = max(held.embedding, held.head, layers)
    return _WRITING + max(4 * largest / math.ceil(largest / PIECE), job.itemsize * largest)


@dataclass(frozen=True)
class _LayerBytes:
    """For each of a pack's tokens, on this rank."""

    kept: float
    """until the backward pass"""
    working: float
    """while the layer is computed"""


def _layer_bytes(job: Job) -> _LayerBytes:
    size, item, tensor, context = job.size, job.itemsize, job.parallel.tensor, job.parallel.context
    own = tensor if job.sequence else 1
    normed = 1 if job.fp8 else item
    q, k, f, h = size.queries / tensor, size.keys / tensor, size.ffn / tensor, size.hidden / own
    inputs = item * h
    everything = (
        2 * inputs
        + 2 * normed * h
        + item * (q + 2 * k)
        + (item + (1 if job.fp8 else 0)) * q
        + item * 2 * f
        + normed * f
        + (item * (q + k) if size.needs.qk_norm != "none" else 0)
    )
    softmax = 0 if job.recompute == "selective" else 4 * size.heads / tensor
    grown = item * (3 * f + 2 * size.hidden)  # gradients of gate, up and product, and of the layer's ends
    if job.recompute == "full":
        return _LayerBytes(inputs / context, (everything + 4 * size.heads / tensor + grown) / context)
    return _LayerBytes((everything + softmax) / context, grown / context)


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
    gradient = columns * size.hidden * (job.itemsize + (4 if chunks > 1 else 0))
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
