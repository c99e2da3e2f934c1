"""vLLM servers: the memory of a GPU, the time of a step's responses, the time of a weight transfer.

Decoding reads all weights and the keys and values of every sequence once a token; that or the arithmetic, whichever is longer, is
a decoding step (Pope et al., arXiv 2211.05102). The constants here are estimates: nothing of this was calibrated.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tulu_mega.layout.flops import head_columns, matmul_parameters
from tulu_mega.layout.hardware import Gpu
from tulu_mega.plan.model.costs import Rates
from tulu_mega.plan.model.job import Job, sizes_of
from tulu_mega.plan.model.parameters import model_parameters

STEP = 3e-3
"""Seconds of a decoding step beside the GPU's work: scheduling, sampling, log-probabilities, HTTP."""
COLLECTIVE = 15e-6
"""Seconds of a small all-reduce within a node, two a layer."""
WORKING = 4 * 2**30
"""Bytes that vLLM's profiling run finds for activations, logits and CUDA graphs."""

COMMUNICATOR = 2**30 // 5
"""Bytes of NCCL's buffers for a group of one sender and a server's workers: 0.1 to 0.3 GiB by its channels."""
HASHING = 7 * 2**30 // 10
"""Bytes that a GPU takes to hash a piece of 16 MiB of elements as integers of 64 bits, with what torch makes on the way."""


@dataclass(frozen=True)
class Servers:
    """Servers that generate, all alike."""

    count: int
    tensor: int
    gpu: Gpu
    concurrency: int
    """responses that a server computes at once, if its memory holds their keys and values"""
    share: float
    """share of a GPU's memory that vLLM takes"""
    itemsize: int
    """bytes of a weight, and of a key or value"""
    bucket: int
    """bytes of a bucket of weights"""
    fp8: bool = False
    """the layers' matrices take a byte an element"""
    elsewhere: bool = False
    """whether they are on other hosts than the trainer, or take weights as if they were"""

    @property
    def gpus(self) -> int:
        """Return the number of GPUs of all servers."""
        return self.count * self.tensor


@dataclass(frozen=True)
class ServerMemory:
    """A rollout GPU's memory in bytes."""

    weights: float
    cache: float
    """for keys and values: what is left; below 0 the model does not fit"""
    working: float
    sync: float
    """weights as they arrive, beside what vLLM takes: a buffer for each sender, and what waits until its layer is complete"""
    room: float
    """memory that vLLM leaves for arriving weights"""
    tokens: int
    """number of tokens whose keys and values fit into one server's GPUs"""


def server_memory(config: Mapping[str, Any], servers: Servers, job: Job | None = None) -> ServerMemory:
    """How a GPU's memory is shared out.

    Args:
        config: Hugging Face's config.json.
        job: of the trainer that sends weights; None, none are sent.
    """
    weights = _weight_bytes(config, servers) / servers.tensor
    taken = servers.share * servers.gpu.memory
    cache = taken - weights - WORKING
    tokens = max(0, int(cache // cache_bytes(config, servers)))
    sync = inbox_bytes(servers, job) if job else 0.0
    return ServerMemory(weights, cache, WORKING, sync, servers.gpu.memory - taken, tokens)


def inbox_bytes(servers: Servers, job: Job) -> float:
    """Bytes on each of a server's GPUs while weights arrive. On one host the workers look into the senders' buffers. Elsewhere a
    worker has a buffer for every sender, which are the pipeline's stages, as large as the largest bucket it had of it: a tensor
    above the limit is a bucket of its own. And vLLM's loaders keep a projection's parts until all are there: gate and up whole,
    or queries, keys and values, but for the last of them. Communicators and hashes come on top."""
    matrix = 1 if servers.fp8 else servers.itemsize
    size = job.size
    waiting = HASHING + matrix * size.hidden * max(size.ffn, size.queries + size.keys)
    if not servers.elsewhere and job.world + servers.gpus <= job.gpu.per_node:
        return waiting
    largest = matrix * size.hidden * max(size.ffn, size.queries)
    ends = [servers.itemsize * job.parallel.tensor * max(held.embedding, held.head) for held in job.held]
    return waiting + sum(COMMUNICATOR + max(servers.bucket, largest, end) for end in ends)


def cache_bytes(config: Mapping[str, Any], servers: Servers) -> float:
    """Bytes of a token's keys and values on a GPU; where there are fewer key heads than GPUs each has one."""
    size = sizes_of(config)
    head = size.queries // size.heads
    return 2 * config["num_hidden_layers"] * max(head, size.keys / servers.tensor) * servers.itemsize


def _weight_bytes(config: Mapping[str, Any], servers: Servers) -> float:
    """Return the bytes of a whole model in a server and in transfer; scales add a 4,000th."""
    return model_parameters(config) * servers.itemsize - _saved(config, servers)


def _saved(config: Mapping[str, Any], servers: Servers) -> float:
    """Return the bytes that FP8 saves in the layers' matrices."""
    matrices = matmul_parameters(config) - config["hidden_size"] * head_columns(config)
    return (servers.itemsize - 1) * matrices if servers.fp8 else 0.0


def generation_seconds(
    config: Mapping[str, Any], servers: Servers, prompts: Sequence[int], responses: Sequence[int], rates: Rates
) -> float:
    """Return the seconds until the last response of a batch has come.

    Every server takes its share in order and computes as many at once as it may; a response that ends makes room for the next.

    Args:
        config: Hugging Face's config.json.
        prompts, responses: tokens of each request's prompt and response.
    """
    room = server_memory(config, servers).tokens
    longest = max(map(sum, zip(prompts, responses, strict=True)), default=0)
    at_once = min(servers.concurrency, room // longest if longest else 0)
    if not at_once:
        return float("inf")
    return max(
        _served(config, servers, prompts[at :: servers.count], responses[at :: servers.count], at_once, rates)
        for at in range(min(servers.count, len(prompts)))
    )


def _served(
    config: Mapping[str, Any], servers: Servers, prompts: Sequence[int], responses: Sequence[int], at_once: int, rates: Rates
) -> float:
    """One server: from event (a response ends, the next begins) to event, with as many decoding steps between as there are."""
    gpu, size = servers.gpu, sizes_of(config)
    memory = rates.memory * gpu.bandwidth
    arithmetic = 2 * matmul_parameters(config) / servers.tensor / (rates.products * (gpu.fp8 if servers.fp8 else gpu.bf16))
    once = STEP + (matmul_parameters(config) * servers.itemsize - _saved(config, servers)) / servers.tensor / memory
    if servers.tensor > 1:
        once += 2 * config["num_hidden_layers"] * COLLECTIVE
    token = cache_bytes(config, servers) / memory
    squares = 2 * config["num_hidden_layers"] * size.queries / servers.tensor / (rates.attention * gpu.bf16)
    seconds, step, context = 0.0, 0, 0
    running: list[tuple[int, int]] = []  # (decoding step at which it ends, tokens it then has)
    waiting = list(zip(prompts, responses, strict=True))[::-1]
    while waiting or running:
        while waiting and len(running) < at_once:
            prompt, response = waiting.pop()
            seconds += prompt * arithmetic + squares * prompt**2
            heapq.heappush(running, (step + response, prompt + response))
            context += prompt
        ends = running[0][0]
        steps, batch = ends - step, len(running)
        reading = once + token * (context + batch * steps / 2)
        seconds += steps * max(reading, STEP + batch * arithmetic)
        context += batch * steps
        step = ends
        while running and running[0][0] <= step:
            context -= heapq.heappop(running)[1]
    return seconds


def sync_seconds(job: Job, servers: Servers, rates: Rates) -> float:
    """Weights to all servers: every pipeline stage sends its own, whole, from its first tensor rank; every worker takes all of
    them. Within a node over NVLink, else through one network card on either side."""
    gpu = job.gpu
    near = not servers.elsewhere and job.world + servers.gpus <= gpu.domain
    rate = rates.links * (gpu.nvlink if near else gpu.network)
    whole = _weight_bytes(job.config, servers)
    each = whole / model_parameters(job.config)
    stages = [held.total * job.parallel.tensor * each for held in job.held]
    gathered = max(stages) / (rates.links * gpu.nvlink) if job.parallel.tensor > 1 else 0.0
    return max(gathered, max(stages) / rate, whole / rate)
