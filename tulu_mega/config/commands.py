"""What each command takes: one frozen settings object a command."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from tulu_mega.config.megatron_fields import check_megatron_table
from tulu_mega.config.sections import (
    CheckpointSettings,
    DataSettings,
    ModelSettings,
    OptimSettings,
    ParallelSettings,
    PositiveInt,
    Section,
    TrainSettings,
    WandbSettings,
)


class EngineSettings(Section):
    """What every command that builds a Megatron model shares."""

    model: ModelSettings
    parallel: ParallelSettings = ParallelSettings()
    megatron: dict[str, Any] = {}
    """Fields of megatron-core's TransformerConfig that no setting of ours names."""

    @field_validator("megatron")
    @classmethod
    def _known_fields(cls, table: dict[str, Any]) -> dict[str, Any]:
        check_megatron_table(table)
        return table


class SftSettings(EngineSettings):
    """`tulu-mega sft`: supervised fine-tuning."""

    run_dir: str
    """Directory of this run: config.json, metrics.jsonl, checkpoints/, hf/, logs/. A run found there goes on."""
    seed: int = 123
    data: DataSettings
    train: TrainSettings = TrainSettings()
    optim: OptimSettings = OptimSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    wandb: WandbSettings = WandbSettings()


class ScoreSettings(EngineSettings):
    """`tulu-mega score`: per-token log-probabilities of given texts."""

    input: str
    """JSONL; rows of `messages`, `text` or `input_ids`, with an optional `id`."""
    output: str
    """JSONL to write: `id`, `input_ids`, `logprobs` (natural log, tokens 2..n), `sum`, in input order."""
    template: Annotated[str, Field(pattern="^(tulu|tokenizer)$")] = "tulu"
    tokenizer: str | None = None
    pack_length: PositiveInt = 8192
    """Tokens a packed micro-batch may hold on one data-parallel rank (a longer text has one of its own)."""


class GenerateSettings(Section):
    """`tulu-mega generate`: vLLM on a model directory, from JSONL or at a prompt."""

    model: ModelSettings
    input: str | None = None
    """JSONL; rows of `messages`, `prompt` or `input_ids`. Unset: an interactive prompt."""
    output: str | None = None
    """JSONL to write: the row with `response`, `output_ids`, `finish_reason`. Unset with `input`: standard output."""
    template: Annotated[str, Field(pattern="^(tulu|tokenizer)$")] = "tulu"
    system: str | None = None
    """System message put before a conversation that has none."""
    max_tokens: PositiveInt = 512
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    samples: PositiveInt = 1
    """Responses to each prompt."""
    seed: int = 0
    tensor: PositiveInt = 1
    """vLLM's tensor parallel size."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and response together; the model's own limit when unset."""
