"""What megatron-core runs on: CUDA as it is, or a CPU made to look like the device it expects.

The only place of the project where anything of another library is replaced.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Platform:
    """Where tensors live and what carries collectives."""

    device: torch.device
    backend: str
    """torch.distributed back end"""


def prepare_imports() -> None:
    """Imports megatron-core, quietly and fast. Call it before anything else does; it may be called again.

    megatron-core warns, when it is imported, of every package it could also use, and calls functions that torch will rename:
    nothing that a user of this project can act on. Where it is not installed nothing is imported.
    """
    from tulu_mega.platforms.cpu_speed.imports import import_megatron

    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    import_megatron()


def install(local_rank: int = 0) -> Platform:
    """Prepares this process for megatron-core. Call once, before any other module of megatron-core is used.

    Args:
        local_rank: rank among this machine's processes; picks the CUDA device.
    """
    from tulu_mega.platforms import adam, grad_norm, weight_gradient

    prepare_imports()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        platform = Platform(device, "nccl")
    else:
        from tulu_mega.platforms import cpu

        cpu.install()
        platform = Platform(torch.device("cpu"), "gloo")
    adam.install()
    grad_norm.install()
    weight_gradient.install()
    return platform
