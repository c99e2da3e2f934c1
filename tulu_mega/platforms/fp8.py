"""The requirements of FP8 on a machine, in training and in rollouts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from tulu_mega.outside.versions import INSTALL_ENGINE, of_package

Recipe = Literal["delayed", "tensorwise", "blockwise"]

_ENGINE = {"delayed": (1, 0), "tensorwise": (2, 2), "blockwise": (2, 3)}
"""For each recipe, the oldest Transformer Engine with which megatron-core accepts it."""
_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}
_CUDA = {"blockwise": (12, 9)}
"""Oldest CUDA for block-wise FP8: cuBLAS of older toolkits has no products of 128 x 128 blocks."""

Version = tuple[int, ...]


@dataclass(frozen=True)
class Machine:
    """The properties of a machine that decide whether FP8 can be trained on it."""

    capability: Version | None
    """the least of its devices' compute capabilities; None without a CUDA device"""
    cuda: Version | None
    """CUDA version that torch was built with; None for a CPU build"""
    engine: Version | None
    """Transformer Engine's version; None where it is not installed"""


def this_machine() -> Machine:
    """Describe this machine, without memory on a device or an import of Transformer Engine."""
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    capability = min((torch.cuda.get_device_capability(device) for device in devices), default=None)
    engine = of_package("transformer-engine")
    return Machine(capability, torch.version.cuda and _numbers(torch.version.cuda), engine and _numbers(engine))


def obstacles(recipe: Recipe, machine: Machine) -> list[str]:
    """Return each reason why the recipe cannot be trained there: what was found, what is needed, what to do."""
    problems, instead = [], "set precision.fp8 to 'off' to train in bf16"
    asked, need = f"precision.fp8 = {recipe!r}", _ENGINE[recipe]
    if machine.engine is None:
        problems.append(
            f"{asked} needs Transformer Engine, which is not installed here; {INSTALL_ENGINE}, or {instead}"
        )
    elif machine.engine < need:
        found = _dotted(machine.engine)
        problems.append(f"{asked} needs Transformer Engine {_dotted(need)}, found {found}; update it, or {instead}")
    if machine.capability is None:
        return [*problems, f"{asked} needs a CUDA device, torch sees none here; start on GPUs, or {instead}"]
    need = _CAPABILITY[recipe]
    if machine.capability < need:
        which = "H100" if need == (9, 0) else "L40 or H100"
        problems.append(
            f"{asked} needs compute capability {_dotted(need)} ({which} or newer), found {_dotted(machine.capability)}; {instead}"
        )
    need = _CUDA.get(recipe)
    if need and machine.cuda is not None and machine.cuda < need:
        problems.append(
            f"{asked} needs CUDA {_dotted(need)}, torch was built with {_dotted(machine.cuda)}; install a torch of CUDA "
            f"{_dotted(need)} or newer, or choose 'tensorwise'"
        )
    return problems


def server_obstacles() -> list[str]:
    """Return why vLLM's servers on this machine cannot have layers in FP8 blocks. (On GPUs without FP8 products vLLM uses
    others.)"""
    if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported():
        return []
    return [
        "rollout.quantization = 'fp8' needs GPUs or a CPU with AMX (Sapphire Rapids or newer), for which vLLM's FP8 products "
        "are written; set it to 'none'"
    ]


def _numbers(version: str) -> Version:
    """``2.3.0.dev0+abc`` to (2, 3, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version).group().split("."))


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
