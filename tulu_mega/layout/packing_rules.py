"""The rules of packing under a layout, from the settings and the model's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulu_mega.config import EngineSettings
from tulu_mega.layout.alignment import Alignment, alignment
from tulu_mega.layout.cost import sequence_flops
from tulu_mega.layout.flops import head_columns
from tulu_mega.layout.schedule import Pipeline, stage_shares
from tulu_mega.layout.stages import stage_layers


def pack_alignment(settings: EngineSettings) -> Alignment:
    """Return the multiples that the layout and the FP8 recipe require of lengths."""
    parallel = settings.parallel
    sequence = parallel.sequence and parallel.tensor > 1
    return alignment(parallel.tensor, sequence, parallel.context, settings.precision.recipe)


def pipeline_of(config: Mapping[str, Any], settings: EngineSettings) -> Pipeline:
    """Return the layout's description for the simulation of the schedule.

    Args:
        config: Hugging Face's config.json.

    Raises:
        UserError: the layers do not go into the stages.
    """
    parallel, hidden = settings.parallel, config["hidden_size"]
    layer = sequence_flops(hidden, config["intermediate_size"], layers=1)(1)
    return Pipeline(
        ranks=parallel.pipeline,
        chunks=parallel.virtual_pipeline,
        shares=stage_shares(stage_layers(config, parallel), layer, head=2.0 * hidden * head_columns(config)),
        backward=3.0 if settings.model.recompute == "full" else 2.0,
    )
