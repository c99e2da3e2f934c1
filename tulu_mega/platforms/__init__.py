"""What megatron-core runs on: CUDA as it is, or a CPU made to look like the device it expects.

The only place of the project where anything of another library is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tulu_mega.platforms.imports import prepare_imports


@dataclass(frozen=True)
class Platform:
    """Where tensors live and what carries collectives."""

    device: torch.device
    backend: str
    """torch.distributed back end"""


def install(local_rank: int = 0) -> Platform:
    """Prepares this process for megatron-core. Call once, before any other module of megatron-core is used.

    Args:
        local_rank: rank among this machine's processes; picks the CUDA device.
    """
    from tulu_mega.platforms import adam, grad_norm, no_fp8, numa, offload, weight_gradient

    prepare_imports()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        found = torch.cuda.get_device_properties(device)
        numa.bind((found.pci_domain_id, found.pci_bus_id, found.pci_device_id))
        platform = Platform(device, "nccl")
    else:
        from tulu_mega.platforms import cpu

        cpu.install()
        platform = Platform(torch.device("cpu"), "gloo")
    adam.install()
    grad_norm.install()
    weight_gradient.install()
    no_fp8.install()
    offload.install()
    return platform
