"""`tulu-mega plan --explain`: every term of memory and of a step's time as a formula, and with its numbers filled in.

Letters beside those of `kept`: P parameters of a rank   T tokens of a pack   M packs   L layers of a rank   t tensor ranks   V
columns of the head
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tulu_mega.layout.hardware import link
from tulu_mega.plan.arithmetic import Number
from tulu_mega.plan.arithmetic import number as n
from tulu_mega.plan.model.calibration import RATES
from tulu_mega.plan.model.costs import (
    backward_products,
    bytes_between,
    collective_bytes,
    head_passes,
    layer_products,
    layer_unpacked,
    pairs,
    peak,
    tensor_exposed,
)
from tulu_mega.plan.model.job import Job, Pack
from tulu_mega.plan.model.kept import layer_kept, token_bytes
from tulu_mega.plan.model.memory import LOGITS, UNUSABLE, RankMemory
from tulu_mega.plan.model.timing import Step, slowest_replica, update_bytes
from tulu_mega.weight_transfer.slots import SLOTS


@dataclass(frozen=True)
class Term:
    """A part of a sum."""

    part: str
    """whose part it is: of `RankMemory.parts` or `Step.parts`"""
    what: str
    formula: str
    amount: Number
    """bytes or seconds"""


def memory_terms(job: Job, rank: RankMemory) -> list[Term]:
    """What a pipeline rank's memory is the sum of."""
    parallel, size = job.parallel, job.size
    base, trained = n(job.held[rank.rank].total), n(job.trained[rank.rank])
    held = base + n(job.adapters[rank.rank]) if job.lora else base
    left, everything, inputs = token_bytes(job)
    own = parallel.tensor if job.sequence else 1
    shards = job.shards if parallel.distributed_optimizer else 1
    hidden = n(job.longest) * n(size.hidden) * n(job.itemsize) / n(parallel.context)
    grown = n(job.itemsize) * (n(3 * size.ffn) / n(parallel.tensor) + n(2 * size.hidden) / n(own)) / n(parallel.context)
    kept = inputs if job.whole == job.layers else left
    again = everything if any(job.whole) else everything - left
    state = rank.optimizer * shards / trained.value if trained.value else 0.0
    what = "P of adapters" if job.lora else "P"
    formulas = {
        "weights": _weights(job, rank, held),
        "gradients": (f"bytes x {what}", n(rank.gradients / trained.value if trained.value else 0.0) * trained),
        "optimizer": (
            f"(main parameter, moments, but for what main memory has; bf16 gradients in float32) x {what} / (DP x CP)",
            n(state) * trained / n(shards),
        ),
        "activations": ("T x layers in flight x bytes kept of a token, below", n(round(rank.activations / kept)) * n(kept)),
        "working": _working(job, n(again), grown),
        "log_probs": _head(job, rank),
        "pipeline": ("4 T h b / (s CP)", n(4) * hidden / n(own)),
        "outputs": ("T h b / (s CP) x stages' results in flight", n(round(rank.outputs))),
        "communication": (
            ("2 T h b / CP, and what FSDP gathered", n(round(rank.communication)))
            if job.fsdp
            else ("2 T h b / CP", n(2) * hidden)
        ),
        "beside": _beside(job, rank, base, trained),
        "sync": ("buckets x the larger of bucket and largest tensor", n(SLOTS) * n(round(rank.sync / SLOTS))),
        "allocator": ("share x what comes and goes", n(UNUSABLE) * n(round(rank.allocator / UNUSABLE))),
        "reserved": ("CUDA, NCCL, workspaces: an estimate", n(rank.reserved)),
        "value": ("weights, gradients and optimizer of the value model", n(round(rank.value))),
        "value_passes": ("its passes less the policy's, where positive", n(round(rank.value_passes))),
        "rewards": ("bytes x parameters of the reward model", n(job.itemsize) * n(round(rank.rewards / job.itemsize))),
    }
    return [Term(name, name.replace("_", "-"), *formulas[name]) for name, value in rank.parts.items() if value]


def _working(job: Job, again: Number, grown: Number) -> tuple[str, Number]:
    """Of the layer that is computed."""
    formula = "largest T x (what is made again + a layer's gradients)"
    if job.lora is None:
        return formula, n(job.longest) * (again + grown)
    made = n(job.longest) * (again + (grown + n(job.adapter_work.deltas / job.parallel.context)))
    return (formula + " + the weight made whole", made + n(job.made_whole)) if job.blocks else (formula, made)


def _weights(job: Job, rank: RankMemory, held: Number) -> tuple[str, Number]:
    """Of the model and its adapters."""
    if not job.blocks:
        return "bytes x P", n(rank.weights / held.value) * held
    layers = job.held[rank.rank].layers
    return "bytes x P, but bits / 8 of what lies in blocks", n(job.itemsize) * n(held.value - layers) + n(job.blocks) * n(layers)


def _beside(job: Job, rank: RankMemory, base: Number, trained: Number) -> tuple[str, Number]:
    """Further models, and the adapters that a run began with."""
    models, left = divmod(round(rank.beside / job.itemsize), round(base.value))
    whole = n(job.itemsize) * base * n(models)
    if not left:
        return "bytes x P x models", whole
    return "bytes x (P x models + P of adapters x 2)", whole + n(job.itemsize) * trained * n(round(left / trained.value))


def _head(job: Job, rank: RankMemory) -> tuple[str, Number]:
    """Formula and numbers of what head and log-probabilities take."""
    size, context = job.size, job.parallel.context
    if job.full_logits or size.columns == 1:
        return "hidden states, and logits or scores", n(round(rank.log_probs))
    pack = max((pack for packs in job.packs for pack in packs), key=lambda pack: (pack.tokens, pack.labelled))
    columns = size.columns / job.parallel.tensor
    states = n(2) * n(pack.tokens / context + pack.labelled / context) * n(size.hidden) * n(job.itemsize)
    chunks = pack.labelled / context * columns * 4 / LOGITS
    logits = n(min(1.0, chunks) * LOGITS) * n(3.5 if job.entropy else 2.5)
    if job.lora:
        return "2 (T + labelled T) h b / CP + chunks of logits", states + logits
    gradient = n(columns) * n(size.hidden) * n(job.itemsize + (4 if chunks > 1 else 0))
    return "2 (T + labelled T) h b / CP + chunks of logits + the head's gradient", states + logits + gradient


def kept_terms(job: Job) -> list[Term]:
    """What a layer keeps of a token on this rank; of what is made again nothing."""
    made, context = [], job.parallel.context
    for at, each in enumerate(layer_kept(job)):
        again = at > 0 if job.recompute.layers is None else bool(job.recompute.modules & set(each.module.split()))
        made.append(
            Term("activations", each.what, "made again" if again else each.formula, n(0 if again else each.bytes / context))
        )
    return made


def time_terms(job: Job, step: Step) -> list[Term]:
    """What the mean rank of the slowest replica spends a step's seconds on.

    Args:
        step: that of the job.
    """
    made = list(_known(job, slowest_replica(job, RATES)))
    for part, seconds in step.parts.items():
        rest = seconds - sum(term.amount.value for term in made if term.part == part)
        if rest > 2e-3 * seconds:
            made.append(Term(part, *_REST.get(part, ("modules computed again", "their part of a forward pass")), n(rest)))
    order = list(step.parts)
    return sorted(made, key=lambda term: order.index(term.part))


_REST = {
    "idle": ("waiting", "the schedule's span less the mean rank's work"),
    "pipeline": ("hidden states handed on", "T h b / (s CP) / rate, where no pass hides it"),
    "host": ("waiting for the host", "launches x their seconds less the GPU's, where positive"),
    "context": ("keys and values on their way", "their bytes / rate less attention's time, where positive"),
    "data": ("gradients and parameters", "bytes x P x (n - 1) / n / rate less the passes that hide it, where positive"),
}


def _known(job: Job, packs: Sequence[Pack]) -> Iterator[Term]:
    parallel, size, t, ranks = job.parallel, job.size, job.parallel.tensor, job.parallel.pipeline
    tokens, layers = n(sum(pack.tokens for pack in packs) / parallel.context), n(sum(job.layers) / ranks)
    twice = n((sum(job.layers) + sum(job.whole)) / ranks)  # layers that run forward, once more where they are computed again
    memory = n(RATES.memory) * n(job.gpu.bandwidth)
    work, results, gradients, accumulated = layer_products(job, 1)
    yield Term(
        "products",
        "layers",
        "2 T x weights x (forward + backward L) / (share x peak)",
        tokens * n(work) * (twice + n(backward_products(job)) * layers) / (n(RATES.products) * n(peak(job))),
    )
    yield from _of_adapters(job, n(len(packs)), tokens, twice, layers)
    bf16 = n(job.gpu.fp32 if job.dtype == "fp32" else job.gpu.bf16)
    labelled = n(sum(pack.labelled for pack in packs) / parallel.context)
    if size.columns > 1:
        passes, moved = head_passes(job)
        logits = labelled * n(size.columns / t)
        yield Term(
            "products",
            "head",
            "2 labelled T x h V / t x times / (share x bf16 peak) / PP",
            logits * n(2 * size.hidden) * n(passes) / (n(RATES.products) * bf16 * n(ranks)),
        )
        yield Term(
            "elementwise",
            "logits",
            "labelled T x V / t x bytes / (share x memory's rate) / PP",
            logits * n(moved) / (memory * n(ranks)),
        )
    squares = 0.0
    for pack in packs:
        for length in pack.lengths:
            share = length / parallel.context
            squares += pairs(job, length) * (share + RATES.attention_half) / share
    yield Term(
        "attention",
        "queries and keys",
        "4 q x sum of pairs (l + half) / l x (forward + 2.5 / 0.8 backward L) / (t CP x share x bf16 peak)",
        n(4 * size.queries)
        * n(squares)
        * (twice + n(2.5 / RATES.attention_backward) * layers)
        / (n(t * parallel.context) * n(RATES.attention) * bf16),
    )
    ahead, back = bytes_between(job)
    yield Term(
        "elementwise",
        "between products",
        "T x bytes x L, forward and backward / (share x memory's rate)",
        tokens * (n(ahead) * twice + n(back) * layers) / memory,
    )
    yield Term(
        "elementwise",
        "products' results",
        "T x bytes x L, forward and backward / (share x memory's rate)",
        tokens * (n(results) * twice + n(gradients) * layers) / memory,
    )
    yield Term(
        "elementwise",
        "weights' gradients added up",
        "M x bytes x weights x L / (share x memory's rate)",
        n(len(packs)) * n(accumulated) * layers / memory,
    )
    if t > 1:
        forward, backward = collective_bytes(job)
        yield Term(
            "tensor",
            "gathers and scatters",
            "exposed x T h x bytes x L (t - 1) / t / (share x link's rate)",
            n(tensor_exposed(job, RATES))
            * tokens
            * n(size.hidden)
            * (n(forward) * twice + n(backward) * layers)
            * n(t - 1)
            / (n(t) * n(RATES.links) * n(link(job.gpu, t, 1))),
        )
    held = max(job.trained)
    own = held / job.shards if parallel.distributed_optimizer or job.fsdp else held
    yield Term(
        "optimizer",
        "buffers, norm, clipping, Adam",
        "(3 gradients x P + bytes x P / (DP CP)) / (share x memory's rate)",
        (n(3 * job.grad_bytes) * n(own if job.fsdp else held) + n(update_bytes(job)) * n(round(own))) / memory,
    )


def _of_adapters(job: Job, packs: Number, tokens: Number, twice: Number, layers: Number) -> Iterator[Term]:
    """Their own products, and what passes through memory for them."""
    if job.lora is None:
        return
    work, peak16 = job.adapter_work, job.gpu.fp32 if job.dtype == "fp32" else job.gpu.bf16
    yield Term(
        "products",
        "adapters",
        "T x flops x (forward + 2 backward L) / (share x bf16 peak)",
        tokens * n(work.flops) * (twice + n(2) * layers) / (n(RATES.products) * n(peak16)),
    )
    yield Term(
        "elementwise",
        "adapters' inputs and results",
        "T x bytes x L, forward and backward / (share x memory's rate)",
        tokens * (n(work.forward) * twice + n(work.backward) * layers) / (n(RATES.memory) * n(job.gpu.bandwidth)),
    )
    if job.lora.dora:
        yield Term(
            "elementwise",
            "lengths of weights' rows",
            "M x bytes x L, forward / (share x memory's rate)",
            packs * n(work.lengths) * twice / (n(RATES.memory) * n(job.gpu.bandwidth)),
        )
    if job.blocks:
        yield Term(
            "elementwise",
            "weights made whole of blocks",
            "M x bytes x L, forward and backward / (share x memory's rate)",
            packs * n(layer_unpacked(job)) * (twice + layers) / (n(RATES.memory) * n(job.gpu.bandwidth)),
        )
