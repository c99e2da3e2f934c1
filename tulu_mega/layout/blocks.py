"""Whether a layout cuts quantized frozen weights between their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.rules import Cut
from tulu_mega.config import ParallelSettings
from tulu_mega.config.lora import NF4_BLOCK, LoraSettings


def block_problems(config: Mapping[str, Any], lora: LoraSettings | None, parallel: ParallelSettings) -> list[str]:
    """Matrices of which a rank's part of a row is not whole blocks.

    Args:
        config: the model's config.json.
        lora: whose frozen weights may be quantized.
    """
    if lora is None or lora.base_precision == "model":
        return []
    family, found = family_for(config), []
    sizes = family.sizes(config)
    for rule in family.rules:
        for pattern, dims in rule.hf.items():
            if not LoraSettings().has(pattern):
                continue
            columns = sizes[dims[1]]
            if columns % (parallel.tensor * NF4_BLOCK if rule.cut is Cut.ROW else NF4_BLOCK):
                held = f"{columns} columns over {parallel.tensor} tensor ranks" if rule.cut is Cut.ROW else f"{columns} columns"
                found.append(
                    f"lora.base_precision = {lora.base_precision!r}: {pattern.rpartition('.weight')[0].rpartition('.')[2]} has "
                    f"{held}, expected whole blocks of {NF4_BLOCK} on each; choose a smaller parallel.tensor, or "
                    "lora.base_precision = 'model'"
                )
    return found
