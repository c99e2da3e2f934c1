"""The servers that belong to a run's settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega.bridge.files.config_json import read_config
from tulu_mega.bridge.files.hub import is_megatron, model_directory
from tulu_mega.config.rollout import RolloutSettings
from tulu_mega.errors import UserError
from tulu_mega.inference.adapters import described, holds
from tulu_mega.inference.command_line import ServerOptions, core_shares, crowd, device_shares, sharing_obstacles
from tulu_mega.inference.interpreter import interpreter
from tulu_mega.inference.offline import DTYPES
from tulu_mega.inference.pool import ServerPool
from tulu_mega.layout.division import server_problems
from tulu_mega.layout.fp8 import rollout_fp8_problems

if TYPE_CHECKING:
    from tulu_mega.config import ModelSettings, PolicyRunSettings


def companions(settings: PolicyRunSettings, trainers: int) -> ServerPool | None:
    """The servers of a run that are started here; None where it attaches to others (``rollout.urls``). As `servers`."""
    return None if settings.rollout.urls else servers(settings, trainers)


def servers(settings: PolicyRunSettings, trainers: int) -> ServerPool:
    """The pool that the launcher has around a run: it takes weights from the ranks before it is asked anything.

    Args:
        trainers: ranks on this machine, which come first where GPUs are dealt out.

    Raises:
        UserError: vLLM cannot be had, there is no such model, or GPUs do not do for servers and ranks.
    """
    from tulu_mega.vllm_plugin.gate import server_arguments

    rank = 0
    if settings.lora:
        rank, _ = holds(described(settings.model.path, settings.lora), settings.rollout.adapters == "merged")
    options = server_options(settings.model, settings.rollout, settings.longest, tuple(server_arguments()), rank)
    return pool(options, settings.rollout, Path(settings.run_dir), trainers)


def server_options(
    model: ModelSettings,
    rollout: RolloutSettings,
    longest: int | None,
    extra: tuple[str, ...],
    lora_rank: int = 0,
) -> ServerOptions:
    """
    Args:
        longest: prompt and response together, as far as is asked for; the model's own limit when None.
        extra: more arguments for vLLM.
        lora_rank: largest rank of adapters that are held apart; 0: there are none.

    Raises:
        UserError: vLLM cannot be had, there is no such model, or it or this machine does not do for FP8 blocks.
    """
    from tulu_mega.platforms.fp8 import this_machine

    python = interpreter(rollout.python, "rollout.python")
    directory = model_directory(model.path)
    config = read_config(directory)
    if problems := server_problems(config, rollout.tensor) + fp8_obstacles(config, rollout):
        raise UserError(problems)
    limit = config.get("max_position_embeddings")
    asked = rollout.max_model_len or longest
    fp8 = rollout.quantization == "fp8"
    return ServerOptions(
        model=str(directory),
        dtype=DTYPES[model.dtype if rollout.dtype == "model" else rollout.dtype],
        tensor=rollout.tensor,
        max_model_len=min(each for each in (asked, limit) if each is not None),
        concurrency=rollout.concurrency,
        gpu_memory=rollout.memory_share,
        cpu_cache_gib=rollout.cpu_cache_gib,
        trust_remote_code=model.trust_remote_code,
        fp8=fp8,
        blackwell=fp8 and (this_machine().capability or (0,)) >= (10,),
        python=python.path,
        prefix=python.prefix,
        lora_rank=lora_rank,
        random_weights=rollout.random_weights or is_megatron(directory),  # vLLM cannot read the latter
        extra=extra,
    )


def fp8_obstacles(config: Mapping[str, Any], rollout: RolloutSettings) -> list[str]:
    """What keeps servers on this machine from having the layers that they are to have in FP8 blocks.

    Args:
        config: the model's config.json.
    """
    if rollout.quantization != "fp8":
        return []
    from tulu_mega.platforms.fp8 import server_obstacles

    return rollout_fp8_problems(config, rollout) + server_obstacles()


def device_obstacles(rollout: RolloutSettings, trainers: int) -> list[str]:
    """What keeps the servers from having GPUs of this machine, beside the trainer or with it.

    Args:
        trainers: ranks on this machine.
    """
    import torch

    if not torch.cuda.is_available():
        return []
    devices = torch.cuda.device_count()
    shares = device_shares(devices, trainers, rollout.servers, rollout.tensor)
    return sharing_obstacles(shares, devices, trainers, rollout.gpu_memory, rollout.transport, rollout.tensor)


def pool(
    options: ServerOptions,
    rollout: RolloutSettings,
    directory: Path,
    trainers: int,
    *,
    ports: list[int] | None = None,
    key: str | None = None,
) -> ServerPool:
    """Servers with their share of this machine's cores or GPUs.

    Raises:
        UserError: GPUs do not do for them.
    """
    import torch

    if problems := device_obstacles(rollout, trainers):
        raise UserError(problems)
    cores = devices = None
    shared = False  # a GPU, with others
    if torch.cuda.is_available():
        devices = device_shares(torch.cuda.device_count(), trainers, rollout.servers, rollout.tensor)
        most, with_trainer = crowd(devices, trainers)
        shared = most > 1 or with_trainer
    else:
        available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        cores = core_shares(available, rollout.servers, rollout.tensor)
    return ServerPool(
        options,
        directory,
        rollout.servers,
        start_timeout=rollout.start_timeout,
        restarts=rollout.restarts,
        ports=ports,
        key=key,
        cores=cores,
        devices=devices,
        shared=shared,
    )
