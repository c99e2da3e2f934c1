"""Settings of `tulu-mega convert`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tulu_mega.config.sections import PositiveInt, Section


class ConvertSettings(Section):
    """`tulu-mega convert`: a model between Hugging Face's format and Megatron's distributed checkpoint."""

    source: str
    """Directory of a Hugging Face model, its hub name, a Megatron distributed checkpoint (of a run: checkpoints/step_N), or a
    GGUF file, whose weights become fp32."""
    output: str
    """Directory to make. What an interrupted conversion left beside it is gone on with."""
    to: Literal["hf", "megatron"]
    """Format to write: safetensors for Hugging Face, or what training under any layout starts from."""
    dtype: Literal["keep", "bf16", "fp32"] = "keep"
    """Precision of the written weights."""
    adapter: str | None = None
    """Directory of low-rank adapters in PEFT's format that are merged into the weights."""
    config: str | None = None
    """Directory with config.json and tokenizer, for a source that has none (a run's checkpoint)."""
    workers: PositiveInt = 2
    """Processes; under torchrun its ranks share the work instead."""
    file_gib: Annotated[float, Field(gt=0)] = 1.0
    """Weights in a file at most, GiB (a larger tensor has one of its own)."""
    verify: bool = False
    """Read everything back at the end and compare it with the hashes in manifest.json."""
