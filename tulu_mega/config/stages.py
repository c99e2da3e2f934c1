"""What each command takes: one frozen settings object a command."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tulu_mega.config.megatron_fields import check_megatron_table
from tulu_mega.config.precision import PrecisionSettings
from tulu_mega.config.preference import PreferenceSettings
from tulu_mega.config.sections import (
    AskedTemplate,
    CheckpointSettings,
    DataSettings,
    Fraction,
    HeldOutSettings,
    ModelSettings,
    OptimSettings,
    ParallelSettings,
    PositiveInt,
    PreferenceDataSettings,
    ReferenceSettings,
    Section,
    SftTrainSettings,
    TrainSettings,
    WandbSettings,
    WatchdogSettings,
)


class EngineSettings(Section):
    """What every command that builds a Megatron model shares."""

    model: ModelSettings
    parallel: ParallelSettings = ParallelSettings()
    precision: PrecisionSettings = PrecisionSettings()
    megatron: dict[str, Any] = {}
    """Fields of megatron-core's TransformerConfig that no setting of ours names."""
    watchdog: WatchdogSettings = WatchdogSettings()

    @field_validator("megatron")
    @classmethod
    def _known_fields(cls, table: dict[str, Any]) -> dict[str, Any]:
        check_megatron_table(table)
        return table

    @model_validator(mode="after")
    def _fp8_has_its_layers(self) -> EngineSettings:
        if self.precision.recipe is None:
            return self
        needs = []
        if self.model.dtype != "bf16":
            needs.append(f"model.dtype = 'bf16', got {self.model.dtype!r}")
        if self.model.spec == "local":
            needs.append("Transformer Engine's layers, but model.spec = 'local'; set it to 'auto' or 'te'")
        if needs:
            raise ValueError(f"precision.fp8 = {self.precision.fp8!r} needs {'; and '.join(needs)}")
        if self.precision.fp8_param_gather and not self.parallel.distributed_optimizer:
            raise ValueError("precision.fp8_param_gather needs parallel.distributed_optimizer; turn it on")
        return self


class RunSettings(EngineSettings):
    """What every command shares that trains."""

    run_dir: str
    """Directory of this run: config.json, metrics.jsonl, checkpoints/, hf/, logs/. A run found there goes on."""
    seed: int = 123
    optim: OptimSettings = OptimSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    wandb: WandbSettings = WandbSettings()

    @model_validator(mode="after")
    def _fp8_has_its_optimizer(self) -> RunSettings:
        if self.precision.fp8_param_gather and self.optim.name != "adamw":
            raise ValueError(f"precision.fp8_param_gather needs optim.name = 'adamw', got {self.optim.name!r}")
        return self


class StageSettings(RunSettings):
    """What every stage shares that learns from a fixed data set."""

    data: DataSettings
    train: TrainSettings = TrainSettings()
    heldout: HeldOutSettings | None = None
    """Rows to evaluate on while training."""


class SftSettings(StageSettings):
    """`tulu-mega sft`: supervised fine-tuning."""

    train: SftTrainSettings = SftTrainSettings()
    heldout: HeldOutSettings | None = None
    """Conversations to evaluate on while training: their mean loss per supervised token."""


class _OnePass(TrainSettings):
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data; ignored when `steps` is given."""


class _DpoOptim(OptimSettings):
    lr: Annotated[float, Field(ge=0)] = 5e-7
    """Peak learning rate."""
    warmup: Fraction = 0.1
    """Share of the steps in which the rate rises linearly from 0."""


class PreferenceStageSettings(StageSettings):
    """What the stages share that learn from pairs."""

    data: PreferenceDataSettings
    train: _OnePass = _OnePass()
    heldout: HeldOutSettings | None = None
    """Pairs to evaluate on while training."""


class DpoSettings(PreferenceStageSettings):
    """`tulu-mega dpo`: preference tuning of a policy by DPO and its relatives."""

    optim: _DpoOptim = _DpoOptim()
    preference: PreferenceSettings = PreferenceSettings()
    reference: ReferenceSettings = ReferenceSettings()

    @model_validator(mode="after")
    def _no_margin(self) -> DpoSettings:
        if self.data.margin is not None:
            raise ValueError(f"data.margin = {self.data.margin!r}: only reward models (tulu-mega rm) learn margins; leave it out")
        return self


class _RmData(PreferenceDataSettings):
    overlong: Literal["truncate", "reject"] = "reject"
    """Pairs with a side longer than `max_length`: cut on the right, or left out (Tulu 3)."""


class _RmTrain(_OnePass):
    global_batch: PositiveInt = 256
    """Pairs in an optimizer step, over all ranks."""


class _RmOptim(OptimSettings):
    lr: Annotated[float, Field(ge=0)] = 3e-6
    """Peak learning rate."""


class RmSettings(PreferenceStageSettings):
    """`tulu-mega rm`: a reward model from pairs (Bradley-Terry)."""

    data: _RmData
    train: _RmTrain = _RmTrain()
    optim: _RmOptim = _RmOptim()


class ScoreSettings(EngineSettings):
    """`tulu-mega score`: per-token log-probabilities of given texts, or a reward model's scores."""

    input: str
    """JSONL; rows of `messages`, `text` or `input_ids`, with an optional `id`."""
    output: str
    """JSONL to write, in input order: `id`, `input_ids`, `logprobs` (natural log, tokens 2..n), `sum`; of a reward model `id`,
    `input_ids`, `score` (at the last token)."""
    template: AskedTemplate = "auto"
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer; the model's own when unset."""
    pack_length: PositiveInt = 8192
    """Tokens a packed micro-batch may hold on one data-parallel rank (a longer text has one of its own)."""


class GenerateSettings(Section):
    """`tulu-mega generate`: vLLM on a model directory, from JSONL or at a prompt."""

    model: ModelSettings
    input: str | None = None
    """JSONL; rows of `messages`, `prompt` or `input_ids`. Unset: an interactive prompt."""
    output: str | None = None
    """JSONL to write: the row with `response`, `output_ids`, `finish_reason`. Unset with `input`: standard output."""
    template: AskedTemplate = "auto"
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
