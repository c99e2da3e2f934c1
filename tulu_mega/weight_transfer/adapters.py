"""The low-rank adapter that a trainer keeps new in its servers: what both ends call it.

vLLM keeps keys and values of prompts by an adapter's name and path. So each version has a path of its own: what was computed with
older weights under the same name is never taken for the newer ones'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAME = "policy"
"""What a request names that is to be answered with the trainer's adapter."""
ID = 1_000_000
"""vLLM's number for it; adapters that a server is started with are numbered from 1."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be started for (`MaxLoRARanks`); adapters of smaller ones run there too."""
_ITS_OWN = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
"""Of adapter_config.json, what asks for more than vLLM computes (`PEFTHelper._validate_features`)."""


def largest_rank(config: Mapping[str, Any]) -> int:
    """Return the largest rank of a directory's adapters.

    Args:
        config: the content of adapter_config.json.

    >>> largest_rank({"r": 4, "rank_pattern": {"q_proj": 9}})
    9
    """
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def apart_obstacles(config: Mapping[str, Any]) -> list[str]:
    """Return why vLLM cannot hold adapters apart from a model's weights, in words; nothing where it can.

    Args:
        config: the content of adapter_config.json.

    >>> apart_obstacles({"r": 600, "use_dora": True, "bias": "none"})
    ['use_dora is set', 'rank 600 is above 512']
    """
    found = [f"{name} is set" for name in _ITS_OWN if config.get(name)]
    if (bias := config.get("bias") or "none") != "none":
        found.append(f"bias is {bias!r}")
    if saved := config.get("modules_to_save"):
        found.append(f"{', '.join(saved)} is saved whole")
    if (rank := largest_rank(config)) > RANKS[-1]:
        found.append(f"rank {rank} is above {RANKS[-1]}")
    return found


def path(version: int) -> str:
    """Where vLLM believes the adapter of an update to lie. Nothing is read from there: the workers have it in memory.

    >>> path(7)
    'memory://policy/7'
    """
    return f"memory://{NAME}/{version}"
