"""Checks that a layout divides a model's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulu_mega.config import ParallelSettings
from tulu_mega.errors import UserError
from tulu_mega.layout.stages import stage_layers


def layout_problems(config: Mapping[str, Any], parallel: ParallelSettings) -> list[str]:
    """Return the sizes of a model that the layout does not divide, or that are too small for it, as problems.

    Args:
        config: the model's config.json.
    """
    heads = config["num_attention_heads"]
    sizes = [
        ("parallel.tensor", parallel.tensor, "num_attention_heads", heads),
        ("parallel.tensor", parallel.tensor, "num_key_value_heads", config.get("num_key_value_heads") or heads),
        ("parallel.tensor", parallel.tensor, "intermediate_size", config["intermediate_size"]),
    ]
    problems = [
        f"{setting} = {by} does not divide the model's {name} = {size}; choose a divisor"
        for setting, by, name, size in sizes
        if size % by
    ]
    try:
        stage_layers(config, parallel)
    except UserError as error:
        problems += error.problems
    return problems


def server_problems(config: Mapping[str, Any], tensor: int) -> list[str]:
    """Return the sizes of a model that vLLM cannot cut into a server's parts, as problems. vLLM repeats key heads where there are
    fewer.

    Args:
        config: the model's config.json.
        tensor: GPUs of a server, or its workers on CPUs.
    """
    heads, ffn = config["num_attention_heads"], config["intermediate_size"]
    keys = config.get("num_key_value_heads") or heads
    sizes = {"num_attention_heads": heads, "intermediate_size": ffn} | ({"num_key_value_heads": keys} if keys > tensor else {})
    problems = [
        f"rollout.tensor = {tensor} does not divide the model's {name} = {size}; choose a divisor"
        for name, size in sizes.items()
        if size % tensor
    ]
    if keys <= tensor and tensor % keys:
        problems.append(f"rollout.tensor = {tensor} is no multiple of the model's num_key_value_heads = {keys}; choose one")
    return problems
