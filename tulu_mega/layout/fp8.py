"""Checks of a model's shapes for FP8, under a trainer's layout and in a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulu_mega.bridge.families import family_for
from tulu_mega.config import EngineSettings, RolloutSettings
from tulu_mega.layout.alignment import FP8_MULTIPLE


def fp8_problems(config: Mapping[str, Any], settings: EngineSettings) -> list[str]:
    """Products whose extents on a tensor rank are not the multiples that the recipe's kernels take; too many layers in bf16.

    Only the layers' products are FP8: the vocabulary need not divide. (Lengths are the packing's business.)

    Args:
        config: the model's config.json.
    """
    precision, tensor = settings.precision, settings.parallel.tensor
    if precision.recipe is None:
        return []
    size, multiple = family_for(config).sizes(config), FP8_MULTIPLE[precision.recipe]
    extents = {
        "hidden_size": size["hidden"],
        "intermediate_size": size["ffn"] / tensor,
        "channels of query heads": size["queries"] / tensor,
        "channels of query, key and value heads": (size["queries"] + 2 * size["keys"]) / tensor,
    }
    problems = [
        f"precision.fp8 = {precision.fp8!r} wants multiples of {multiple}, but {name} on a tensor rank are {extent:g}; "
        "choose another parallel.tensor or recipe"
        for name, extent in extents.items()
        if extent % multiple
    ]
    layers, stages = config["num_hidden_layers"], settings.parallel.pipeline
    for name, kept in (("first_bf16", precision.first_bf16), ("last_bf16", precision.last_bf16)):
        if kept > layers // stages:
            problems.append(
                f"precision.{name} = {kept}: megatron-core keeps at most {layers // stages} layers in bf16 at an end, "
                f"the model's {layers} over {stages} pipeline stages; lower it"
            )
    return problems


def rollout_fp8_problems(config: Mapping[str, Any], rollout: RolloutSettings) -> list[str]:
    """Matrices whose shares on a server's workers are not whole blocks, which vLLM refuses.

    Args:
        config: the model's config.json.
    """
    if rollout.quantization != "fp8":
        return []
    size, multiple = family_for(config).sizes(config), FP8_MULTIPLE["blockwise"]
    wholes = {
        "intermediate_size": (size["ffn"], rollout.tensor),
        "channels of query heads": (size["queries"], rollout.tensor),
        # where there are more workers than key heads each has one
        "channels of key heads": (size["keys"], min(rollout.tensor, size["groups"])),
    }
    helps = "" if any(whole % multiple for whole, _ in wholes.values()) else "lower rollout.tensor or "
    return [
        f"rollout.quantization = 'fp8' wants multiples of {multiple}, but {name} on a worker are {whole / parts:g}; "
        f"{helps}set rollout.quantization to 'none'"
        for name, (whole, parts) in wholes.items()
        if whole % (multiple * parts)
    ]
