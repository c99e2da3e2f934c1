"""What of a model does not divide by a layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulu_mega.config import ParallelSettings
from tulu_mega.errors import UserError
from tulu_mega.layout.stages import stage_layers


def layout_problems(config: Mapping[str, Any], parallel: ParallelSettings) -> list[str]:
    """What of a model does not divide by the layout, or is not enough for it.

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
