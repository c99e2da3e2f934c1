"""What a layer and the head cost a rank for one micro-batch: seconds, by what they are spent on.

Matrix products run at a share of the GPU's peak and write their results at its memory's rate (reading operands is hidden behind
the products). Everything between them is bound by memory: its bytes are counted below. Attention's rate depends on the length.
Collectives take the bytes that a rank sends over the rate of its link.

A pass that the host takes longer to start than the GPU to run takes as long as the host: small micro-batches do.

T tokens on this rank (those of a pack / CP)   t tensor parallel size   h hidden   f feed-forward   q, k channels of queries, keys
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tulu_mega.layout.hardware import link
from tulu_mega.plan.model.job import Job, Pack


@dataclass(frozen=True)
class Rates:
    """Shares of what the hardware could do at best."""

    products: float
    """of the dense peak that matrix products reach. Fitted, see `calibration`"""
    tensor_exposed: float
    """of the tensor-parallel collectives' time that is not hidden behind products where they pass in pieces, through Transformer
    Engine's user buffers. Fitted, see `calibration`. Without these all of it is exposed: products wait for them"""
    attention: float = 0.635
    """of the bf16 peak that attention reaches forward at great length. FlashAttention-3 on an H100, head size 128, gives
    430, 517, 566, 590, 614, 621 TFLOP/s at lengths 512 to 16,384 (pytorch/benchmark, pull request 2391): as 0.635 n / (n + 220)
    within 2%"""
    attention_half: float = 220.0
    """length at which attention reaches half of that"""
    attention_backward: float = 0.8
    """backward rate over forward rate (FlashAttention-3, arXiv 2407.08608, figures 5 and 6: 0.75 to 0.85 at 4k to 16k)"""
    memory: float = 0.85
    """of the memory's rate that kernels bound by it reach"""
    links: float = 0.8
    """of the links' rate that collectives of some megabytes reach"""
    launch: float = 12e-6
    """seconds in which the host starts a kernel: Python, torch's dispatch, autograd. An estimate, not measured here; the launch
    alone is 3 to 5 microseconds"""
    module: float = 80e-6
    """seconds beside for each of Transformer Engine's modules, which are Python within. An estimate, not measured here"""


@dataclass(frozen=True)
class Cost:
    """Seconds of one rank; adds up, and is multiplied by a number."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor: float = 0.0
    """exposed tensor-parallel communication"""
    context: float = 0.0
    """exposed context-parallel communication"""
    host: float = 0.0
    """the GPU waits for the host"""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.products + other.products,
            self.attention + other.attention,
            self.elementwise + other.elementwise,
            self.tensor + other.tensor,
            self.context + other.context,
            self.host + other.host,
        )

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(own * factor for own in vars(self).values()))


@dataclass(frozen=True)
class LayerCost:
    """What a layer of mean kind (with and without a window) costs, and what computing it again does."""

    forward: Cost
    backward: Cost
    modules: Cost
    """the modules that every layer computes again"""
    launches: tuple[float, float, float]
    """seconds of the host for the first three"""


def stage_cost(layer: LayerCost, layers: int, whole: int, head: tuple[Cost, Cost] | None = None) -> tuple[Cost, Cost]:
    """Forward and backward of a virtual stage.

    Args:
        layers: of it.
        whole: of these, those that are computed again whole.
        head: forward and backward of the head, if it is there.
    """
    ahead, back = layer.forward * layers, layer.backward * layers + layer.modules * (layers - whole) + layer.forward * whole
    forward, backward, again = layer.launches
    hosts = forward * layers, backward * layers + again * (layers - whole) + forward * whole
    if head:
        ahead, back = ahead + head[0], back + head[1]
    ahead, back = (each + Cost(host=max(0.0, host - each.total)) for each, host in zip((ahead, back), hosts, strict=True))
    return ahead, back


def layer_cost(job: Job, pack: Pack, rates: Rates) -> LayerCost:
    """A layer's passes over a micro-batch."""
    tokens = pack.tokens / job.parallel.context
    attention_forward, attention_backward = _attention(job, pack, rates)
    context_forward, context_backward = _context(job, pack, rates)
    tensor_forward, tensor_backward = _tensor(job, tokens, rates)
    product, result_forward, result_backward, accumulated = layer_products(job, tokens)
    speed, memory = rates.products * peak(job), rates.memory * job.gpu.bandwidth
    between_forward, between_backward = (each * tokens / memory for each in bytes_between(job))
    made = layer_unpacked(job)
    adapters, narrow = job.adapter_work, rates.products * (job.gpu.fp32 if job.dtype == "fp32" else job.gpu.bf16)
    forward = Cost(
        product / speed + tokens * adapters.flops / narrow,
        attention_forward,
        between_forward + result_forward / memory + (tokens * adapters.forward + adapters.lengths + made) / memory,
        tensor_forward,
        max(0.0, context_forward - attention_forward),
    )
    backward = Cost(
        backward_products(job) * product / speed + 2 * tokens * adapters.flops / narrow,
        attention_backward,
        between_backward + (result_backward + accumulated) / memory + (tokens * adapters.backward + made) / memory,
        tensor_backward,
        max(0.0, context_backward - attention_backward),
    )
    size, own = job.size, job.parallel.tensor if job.sequence else 1
    again, started, item = Cost(), 0.0, job.itemsize
    if "core_attn" in job.recompute.modules:
        again, started = again + Cost(attention=forward.attention, context=forward.context), started + rates.launch
    if "layernorm" in job.recompute.modules:
        again += Cost(elementwise=4 * item * size.hidden / own * tokens / memory)
        started += 2 * rates.launch
    if "mlp" in job.recompute.modules:
        columns = 3 * size.ffn / job.parallel.tensor
        share = 2 * tokens * columns * size.hidden / product
        moved = item * (3 * size.ffn / job.parallel.tensor + 2 * size.hidden / own)
        again += Cost(forward.products * share, elementwise=moved * tokens / memory, tensor=forward.tensor / 2)
        started += 5 * rates.launch + 2 * rates.module
    elif "activation" in job.recompute.modules:
        again += Cost(elementwise=item * 3 * size.ffn / job.parallel.tensor * tokens / memory)
        started += rates.launch
    return LayerCost(forward, backward, again, (*_launches(job, rates), started))


def _launches(job: Job, rates: Rates) -> tuple[float, float]:
    """Seconds of the host for a layer, forward and backward.

    Kernels forward: two norms, four products, two additions, queries and values made contiguous, two rotations, attention with
    two more around it, activation: 15; backward twice as many, for products and norms make two results each. Collectives under
    tensor parallelism 4 and 6. What is not fused: 5 and 8 for the activation, 16 and 16 for rotations, 4 more backward for
    weights' gradients. FP8 casts each product's operands: 10 and 14.
    """
    kernels, forward, backward = job.kernels, 15, 30
    if job.parallel.tensor > 1:
        forward, backward = forward + 4, backward + 6
    if not kernels.activation:
        forward, backward = forward + 4, backward + 7
    if not kernels.rope:
        forward, backward = forward + 14, backward + 14
    if not kernels.weight_gradients:
        backward += 4
    if job.fp8:
        forward, backward = forward + 10, backward + 14
    if job.size.needs.qk_norm != "none":
        forward, backward = (forward + 2, backward + 4) if job.size.needs.qk_norm == "head" else (forward + 16, backward + 24)
    forward, backward = forward + job.adapter_work.launches, backward + 2 * job.adapter_work.launches
    modules = 4 * rates.module if kernels.transformer_engine else 0.0
    return forward * rates.launch + modules, backward * rates.launch + modules


def head_passes(job: Job) -> tuple[int, int]:
    """How often the head's product runs, and bytes that a logit moves, forward and backward together."""
    if job.full_logits:
        return 2 + (job.lora is None), 14
    return 3 + (job.lora is None), 58 + 24 * job.entropy


def head_cost(job: Job, pack: Pack, rates: Rates) -> tuple[Cost, Cost]:
    """Forward and backward of the head and the log-probabilities, which look only at labelled tokens.

    Logits in chunks are made again backward; bytes a logit, float32: product 6, largest 4, softmax 8 and largest of it 4, gather;
    backward product 6, exponential and factors 24, to bf16 6. All at once (a fused cross-entropy): 8 forward and 6 backward.
    """
    size, tensor = job.size, job.parallel.tensor
    tokens = pack.labelled / job.parallel.context
    if size.columns == 1:  # a reward model's score
        once = Cost(elementwise=4 * pack.tokens / job.parallel.context * size.hidden / (rates.memory * job.gpu.bandwidth))
        return once, once * 2
    columns = size.columns / tensor
    product = 2 * tokens * size.hidden * columns / (rates.products * (job.gpu.fp32 if job.dtype == "fp32" else job.gpu.bf16))
    logits = tokens * columns / (rates.memory * job.gpu.bandwidth)
    again = backward_products(job) * product
    if job.full_logits:
        return Cost(products=product, elementwise=8 * logits), Cost(products=again, elementwise=6 * logits)
    with_entropy = 12 if job.entropy else 0
    return (
        Cost(products=product, elementwise=(22 + with_entropy) * logits),
        Cost(products=product + again, elementwise=(36 + with_entropy) * logits),
    )


def transfer(job: Job, tokens: float, rates: Rates) -> float:
    """Seconds to hand a micro-batch's hidden states to the neighbouring pipeline rank."""
    parallel = job.parallel
    share = parallel.tensor if job.sequence else 1
    rate = job.gpu.nvlink if job.world <= job.gpu.domain else job.gpu.network  # one hop of several nodes' sets the pace
    return tokens / parallel.context / share * job.size.hidden * job.itemsize / (rates.links * rate)


def peak(job: Job) -> float:
    """FLOP/s of the layers' products at best."""
    if job.dtype == "fp32":
        return job.gpu.fp32
    return job.gpu.fp8 if job.fp8 else job.gpu.bf16


def layer_products(job: Job, tokens: float) -> tuple[float, float, float, float]:
    """FLOPs of the four forward products; bytes of their results, of backward results, and of the weights' gradients."""
    size, t, item = job.size, job.parallel.tensor, job.itemsize
    shapes = (  # columns of result and of operand on this rank
        ((size.queries + 2 * size.keys) / t, size.hidden),
        (size.hidden, size.queries / t),
        (2 * size.ffn / t, size.hidden),
        (size.hidden, size.ffn / t),
    )
    weights = sum(wide * deep for wide, deep in shapes)
    results, gradients = (tokens * item * sum(shape[at] for shape in shapes) for at in (0, 1))
    # where products do not add to what is accumulated, a gradient is written and read once more
    accumulated = 2 * job.grad_bytes + (0 if job.kernels.weight_gradients else 2 * item)
    summed = sum(job.adapters) / sum(job.layers) if job.lora else weights
    return 2 * tokens * weights, results, gradients, accumulated * summed


def layer_unpacked(job: Job) -> float:
    """Bytes that pass through memory to make a layer's quantized weights whole, once forward and once backward: bytes read and
    widened to integers, levels looked up in float32, times their scales, to the weights' type. As torch does it step by step; one
    kernel would move 2.5 a weight."""
    return _UNPACKED * sum(held.layers for held in job.held) / sum(job.layers) if job.blocks else 0.0


_UNPACKED = 0.5 + 2 + 2 + 4 + 4 + 4 + 4 + 2
"""Of a weight."""


def backward_products(job: Job) -> int:
    """How often a layer's matrices are multiplied backward: for the input's gradient, and for their own where they have one."""
    return 1 if job.lora else 2


def bytes_between(job: Job) -> tuple[float, float]:
    """Bytes that a token moves between a layer's matrix products, forward and backward, all of it shared by tensor ranks under
    sequence parallelism.

    Forward: two norms and two additions (10 h elements), rotation of queries and keys (2 each), SwiGLU (3 f). Backward: norms and
    additions (12 h), rotation, SwiGLU (5 f). FP8 products want operands with a scale taken from all of the tensor: 6 bytes an
    element (read for the largest, read, written plain and transposed) of h + q + h + f forward, (q + 2k) + h + 2f + h backward.

    What is not fused: SwiGLU by megatron-core's chain goes over 7 f and 13 f elements (the gate's activation 2, a copy of the
    other half 2, their product 3; backward 3 for each factor and for the activation, 4 to join them), a rotation over 10 for 2.
    OLMo 2's norm of whole projections is a chain in float32: 32 bytes for each channel of queries and keys forward, 56 backward.
    """
    size, item, tensor = job.size, job.itemsize, job.parallel.tensor
    h, f, q, k = size.hidden, size.ffn, size.queries, size.keys
    own = tensor if job.sequence else 1  # without sequence parallelism every rank norms and adds all tokens
    normed = {"none": (0, 0), "head": (2 * item, 4 * item), "projection": (32, 56)}[size.needs.qk_norm]
    rotated, (activated, activated_back) = (2, (3, 5) if job.kernels.activation else (7, 13))
    if not job.kernels.rope:
        rotated = 10
    forward = item * (10 * h / own + (rotated * (q + k) + activated * f) / tensor) + normed[0] * (q + k) / tensor
    backward = item * (12 * h / own + (rotated * (q + k) + activated_back * f) / tensor) + normed[1] * (q + k) / tensor
    if job.fp8:
        forward += 6 * (2 * h / own + (q + f) / tensor)
        backward += 6 * (2 * h / own + (q + 2 * k + 2 * f) / tensor)
    return forward, backward


def _attention(job: Job, pack: Pack, rates: Rates) -> tuple[float, float]:
    """Seconds of scores and their application to the values: 4 q n^2 FLOPs forward, half under the causal mask; backward makes
    the scores again and so takes 2.5 times as many (Dao, arXiv 2307.08691)."""
    size, parallel = job.size, job.parallel
    peak = job.gpu.fp32 if job.dtype == "fp32" else job.gpu.bf16
    flops = 0.0
    for length in pack.lengths:
        share = length / parallel.context
        flops += pairs(job, length) * (share + rates.attention_half) / share
    forward = 4 * size.queries * flops / (parallel.tensor * parallel.context) / (rates.attention * peak)
    return forward, 2.5 * forward / rates.attention_backward


def pairs(job: Job, length: int) -> float:
    """Queries times the keys they see, mean over the layers."""
    needs, full = job.size.needs, length**2 / 2
    if needs.window is None or length <= needs.window or not needs.windowed:
        return full
    return full - sum(needs.windowed) / len(needs.windowed) * (length - needs.window) ** 2 / 2


def collective_bytes(job: Job) -> tuple[int, int]:
    """Bytes an element of the hidden states that a layer's tensor-parallel collectives gather and scatter forward and backward
    (Korthikanti et al., arXiv 2205.05198): forward, an all-gather before and a reduce-scatter after attention and feed-forward;
    backward the mirror image, and the inputs gathered once more for the weights' gradients where these train. Without sequence
    parallelism two all-reduces each way. FP8 gathers a byte an element."""
    if job.parallel.tensor == 1:
        return 0, 0
    if not job.sequence:
        return (4 * job.itemsize,) * 2
    gathered = 1 if job.fp8 else job.itemsize
    return 2 * (gathered + job.itemsize), 2 * (backward_products(job) * gathered + job.itemsize)


def tensor_exposed(job: Job, rates: Rates) -> float:
    """Share of these collectives' time that products wait for."""
    return rates.tensor_exposed if job.kernels.user_buffers else 1.0


def _tensor(job: Job, tokens: float, rates: Rates) -> tuple[float, float]:
    """Exposed seconds of tensor-parallel collectives."""
    t = job.parallel.tensor
    once = tokens * job.size.hidden * (t - 1) / t / (rates.links * link(job.gpu, t, 1)) * tensor_exposed(job, rates)
    forward, backward = collective_bytes(job)
    return once * forward, once * backward


def _context(job: Job, pack: Pack, rates: Rates) -> tuple[float, float]:
    """Seconds in which keys and values go round the context-parallel ring, backward with their gradients; meant to hide behind
    attention."""
    parallel = job.parallel
    if parallel.context == 1:
        return 0.0, 0.0
    sent = (parallel.context - 1) * pack.tokens / parallel.context * 2 * job.size.keys / parallel.tensor * job.itemsize
    seconds = sent / (rates.links * link(job.gpu, parallel.context, parallel.tensor))
    return seconds, 2 * seconds


def total(costs: Iterable[Cost]) -> Cost:
    """Sum."""
    return sum(costs, Cost())
