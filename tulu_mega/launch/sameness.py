"""The values that have to be the same on every node of a run, and messages about differences."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_mega import __version__
from tulu_mega.outside.versions import code_digest, of_package

if TYPE_CHECKING:
    from tulu_mega.config import Section

CODE = Path(__file__).parents[1]
"""The package's own directory, all of whose modules have to be the same on every node."""
_PACKAGES = (
    "torch megatron-core transformers transformer-engine vllm flash-attn flash-attn-3 apex triton nvidia-nccl-cu12 "
    "nvidia-nccl-cu13 nvidia-cudnn-cu12 nvidia-cudnn-cu13 safetensors numpy"
).split()
_DECIDE = (
    "CUBLAS_WORKSPACE_CONFIG CUDA_DEVICE_MAX_CONNECTIONS NCCL_ALGO NCCL_BUFFSIZE NCCL_COLLNET_ENABLE NCCL_IB_DISABLE "
    "NCCL_MAX_CTAS NCCL_MAX_NCHANNELS NCCL_MIN_CTAS NCCL_MIN_NCHANNELS NCCL_NET NCCL_NET_PLUGIN NCCL_NVLS_ENABLE "
    "NCCL_P2P_DISABLE NCCL_PROTO NCCL_PXN_DISABLE NCCL_SHM_DISABLE NVIDIA_TF32_OVERRIDE TORCH_ALLOW_TF32_CUBLAS_OVERRIDE "
    "TRITON_INTERPRET"
).split()
"""Environment variables that decide what is computed or how ranks talk, beside those of Transformer Engine (NVTE_*)."""
_NAMED = 4
"""Most nodes that a message names."""
MISSING = "missing"


def of_program() -> dict[str, str]:
    """Return what decides this process's results, by name: Python, packages, this project's code, environment variables."""
    same = {"Python": ".".join(platform.python_version_tuple()[:2]), "tulu_mega": __version__}
    same |= {f"package {name}": version for name in _PACKAGES if (version := of_package(name)) is not None}
    same["tulu_mega's code"] = code_digest(CODE)
    if kernels := importlib.util.find_spec("tulu_kernels"):
        same["tulu_kernels' code"] = code_digest(Path(kernels.origin).parent)
    if "LOCAL_WORLD_SIZE" in os.environ:
        same["number of processes (GPUS_PER_NODE)"] = os.environ["LOCAL_WORLD_SIZE"]
    for name in sorted(os.environ):
        if name in _DECIDE or name.startswith("NVTE_"):
            same[f"variable {name}"] = os.environ[name]
    return same


def of_settings(settings: Section) -> dict[str, str]:
    """By full name, every setting. Those that decide nothing that is computed are among them: ranks save, evaluate and end
    together, and would wait for one another for ever where their settings differ."""
    return {f"setting {name}": json.dumps(value) for name, value in _flat(json.loads(settings.model_dump_json())).items()}


def differences(nodes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a line for each value in which some nodes differ from most nodes; on a tie, from the first node.

    Args:
        nodes: each node's values, by node and name.
    """
    found = []
    first = next(iter(nodes.values()))
    for name in dict.fromkeys(name for same in nodes.values() for name in same):
        values = Counter(same.get(name, MISSING) for same in nodes.values())
        usual = max(values, key=lambda value: (values[value], value == first.get(name, MISSING)))
        for value in values:
            if value != usual:
                odd = [node for node, same in nodes.items() if same.get(name, MISSING) == value]
                found.append(f"{named(odd)}: {name} is {value}, elsewhere {usual}; make them the same")
    return found


def named(nodes: Sequence[str]) -> str:
    """Nodes in words, not too many of them."""
    more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
    return ", ".join(nodes[:_NAMED]) + more


def digest(files: Sequence[Path]) -> str:
    """A digest of names and contents. Raises OSError."""
    taken = hashlib.sha256()
    for file in files:
        taken.update(file.name.encode() + b"\0" + file.read_bytes())
    return taken.hexdigest()[:12]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
