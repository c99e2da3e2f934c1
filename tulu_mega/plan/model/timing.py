"""How long an optimizer step takes, by part: passes of the pipeline's schedule, then gradients, update, parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tulu_mega.layout.flops import training_flops
from tulu_mega.layout.hardware import link
from tulu_mega.layout.schedule import Span, makespan, timeline
from tulu_mega.plan.model.costs import Cost, Rates, head_cost, layer_cost, stage_cost, total, transfer
from tulu_mega.plan.model.job import Job, Pack

_UPDATE = 14
"""Bytes moved for a parameter of a rank's share in Adam, beside its moments, which are read and written: gradient and main
parameter read, the latter written, and the parameter in bf16."""
_NORM = 12
"""And before that: gradients read for their norm, read and written to be clipped."""

_SENT = 8
"""Bytes of a parameter that is updated in main memory, which go there and back: gradient and parameter in float32."""
_HOST_UPDATE = 28
"""Bytes moved there: gradient read, main parameter and moments read and written."""
HOST_BANDWIDTH = 614e9 / 8
"""Bytes/s of main memory for a GPU: two processors of eight channels DDR5-4800 (DGX H100's) among eight. A peak, not measured."""


@dataclass(frozen=True)
class Step:
    """Seconds of a step as the ranks of the slowest replica spend them on average; the parts add up to the step."""

    products: float
    attention: float
    elementwise: float
    tensor: float
    """tensor-parallel communication that is not hidden"""
    context: float
    pipeline: float
    """transfers between pipeline ranks that are not hidden"""
    host: float
    """the GPU waits for its host to start kernels"""
    idle: float
    """waiting: the pipeline fills and drains, stages and micro-batches differ"""
    data: float
    """gradients summed and parameters gathered over replicas, what is not hidden"""
    optimizer: float
    tokens: int
    """real ones, of all replicas"""
    flops: float
    """of the model on these, recomputation not counted"""
    world: int

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """By name."""
        names = ("products", "attention", "elementwise", "tensor", "context", "pipeline", "host", "idle", "data", "optimizer")
        return {name: getattr(self, name) for name in names}

    @property
    def flops_per_gpu(self) -> float:
        """Model FLOP/s of a GPU."""
        return self.flops / self.seconds / self.world


def train_step(job: Job, rates: Rates) -> Step:
    """A step with forward and backward passes, update and all.

    Raises:
        UserError: for a model or layout that does not fit together.
    """
    passes = _Passes(job, rates)
    spans = {packs: passes.span(packs) for packs in set(job.packs)}
    slowest = max(spans, key=spans.__getitem__)
    spent, waited = passes.spent(slowest)
    ranks = job.parallel.pipeline
    lengths = [length for packs in job.packs for pack in packs for length in pack.lengths]
    return Step(
        products=spent.products / ranks,
        attention=spent.attention / ranks,
        elementwise=spent.elementwise / ranks,
        tensor=spent.tensor / ranks,
        context=spent.context / ranks,
        pipeline=waited / ranks,
        host=spent.host / ranks,
        idle=max(0.0, spans[slowest] - (spent.total + waited) / ranks),
        data=_data(job, passes, rates),
        optimizer=_optimizer(job, rates),
        tokens=sum(lengths),
        flops=training_flops(job.config, lengths, frozen=job.lora is not None),
        world=job.world,
    )


def mean_step(made: Sequence[Step], updates: int) -> Step:
    """The mean of some steps, times the updates that a step of the stage has."""
    factor = updates / len(made)
    parts = {name: sum(step.parts[name] for step in made) * factor for name in made[0].parts}
    tokens, flops = (sum(getattr(step, name) for step in made) * factor for name in ("tokens", "flops"))
    return Step(**parts, tokens=round(tokens), flops=flops, world=made[0].world)


def slowest_replica(job: Job, rates: Rates) -> tuple[Pack, ...]:
    """The micro-batches of the replica that the others wait for."""
    return max(set(job.packs), key=_Passes(job, rates).span)


def score_seconds(job: Job, rates: Rates) -> float:
    """Seconds of a forward pass over the step's micro-batches by every replica: the slowest's pipeline, filled once."""
    passes = _Passes(job, rates)
    return max(passes.forward_span(packs) for packs in set(job.packs))


def step_timeline(job: Job, rates: Rates) -> list[Span]:
    """When each pass of the slowest replica's pipeline runs, in seconds from the step's beginning."""
    passes = _Passes(job, rates)
    packs = max(set(job.packs), key=passes.span)
    forward, backward = ([passes.seconds(pack, way) for pack in packs] for way in (False, True))
    return timeline(forward, backward, job.parallel.pipeline, job.parallel.virtual_pipeline)


class _Passes:
    """Costs of all passes of a job; equal packs are looked at once."""

    def __init__(self, job: Job, rates: Rates):
        self._job, self._rates = job, rates
        self._stages = len(job.layers)
        self.costs = lru_cache(maxsize=None)(self._costs)
        self.seconds = lru_cache(maxsize=None)(self._seconds)

    def _costs(self, pack: Pack) -> list[tuple[Cost, Cost, float]]:
        """Forward and backward of every virtual stage, and what a transfer adds to either."""
        job = self._job
        layer, head = layer_cost(job, pack, self._rates), head_cost(job, pack, self._rates)
        sent = transfer(job, pack.tokens, self._rates) if job.parallel.pipeline > 1 else 0.0
        plain = {each: stage_cost(layer, *each) for each in set(zip(job.layers, job.whole, strict=True))}
        made = []
        for stage, each in enumerate(zip(job.layers, job.whole, strict=True)):
            ahead, back = plain[each] if stage < self._stages - 1 else stage_cost(layer, *each, head)
            # an interleaved schedule sends while it computes something else; the plain one waits
            made.append((ahead, back, max(0.0, sent - ahead.total) if job.parallel.virtual_pipeline > 1 else sent))
        return made

    def _seconds(self, pack: Pack, backward: bool) -> list[float]:
        """Of every virtual stage."""
        return [cost[backward].total + cost[2] for cost in self.costs(pack)]

    def span(self, packs: Sequence[Pack]) -> float:
        """From the first pass to the last."""
        forward, backward = ([self.seconds(pack, way) for pack in packs] for way in (False, True))
        return makespan(forward, backward, self._job.parallel.pipeline, self._job.parallel.virtual_pipeline)

    def forward_span(self, packs: Sequence[Pack]) -> float:
        """The same without backward passes: every rank computes micro-batch after micro-batch, the last ends after the first
        rank's start by the time it takes one to get there."""
        ranks = self._job.parallel.pipeline
        by_rank = [[sum(self.seconds(pack, False)[rank::ranks]) for pack in packs] for rank in range(ranks)]
        return max(map(sum, by_rank)) + sum(each[0] for each in by_rank[:-1])

    def spent(self, packs: Sequence[Pack]) -> tuple[Cost, float]:
        """Work and waiting for transfers, all ranks of a replica together."""
        every = [cost for pack in packs for cost in self.costs(pack)]
        return total(part for ahead, back, _ in every for part in (ahead, back)), 2 * sum(sent for _, _, sent in every)


def _data(job: Job, passes: _Passes, rates: Rates) -> float:
    """Exposed seconds of the slowest rank's gradients and parameters over DP x CP: what overlap leaves of them after the backward
    passes of the last micro-batch and the forward passes of the first."""
    shards, parallel = job.shards, job.parallel
    if shards == 1:
        return 0.0
    rate = rates.links * link(job.gpu, shards, parallel.tensor)
    share = (shards - 1) / shards
    weight = 1 if job.fp8_weights else job.itemsize
    worst = 0.0
    for rank, held in enumerate(job.trained):
        forward, backward = (sum(passes.seconds(job.packs[0][0], way)[rank :: parallel.pipeline]) for way in (False, True))
        reduced, gathered = (held * share * each / rate for each in (job.grad_bytes, weight))
        if job.fsdp:  # in every micro-batch: gathered forward and backward, reduced backward, hidden behind either
            exposed = len(job.packs[0]) * (max(0.0, gathered - forward) + max(0.0, gathered + reduced - backward))
        elif parallel.distributed_optimizer:
            exposed = max(0.0, reduced - backward * parallel.overlap_grad_reduce)
            exposed += max(0.0, gathered - forward * parallel.overlap_param_gather)
        else:
            exposed = max(0.0, 2 * reduced - backward * parallel.overlap_grad_reduce)
        worst = max(worst, exposed)
    return worst


def _optimizer(job: Job, rates: Rates) -> float:
    """The rank with the most parameters: buffers zeroed and scaled, norm, clipping, Adam."""
    held = max(job.trained)
    own = held / job.shards if job.parallel.distributed_optimizer or job.fsdp else held
    buffers = own if job.fsdp else held
    on_device = (3 * job.grad_bytes * buffers + update_bytes(job) * own) / (rates.memory * job.gpu.bandwidth)
    return on_device + own * job.host_share * (_SENT / job.gpu.host + _HOST_UPDATE / HOST_BANDWIDTH)


def update_bytes(job: Job) -> int:
    """Bytes moved for a parameter of a rank's share: norm, clipping, Adam; of bf16 gradients float32 ones are made first."""
    updated = (_UPDATE + 4 * job.moment_bytes) * (1 - job.host_share)
    return round(_NORM + updated) + (6 if job.grad_copies and job.grad_bytes == 2 else 0)
