"""What the commands share that build a Megatron model, and those that train one."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from tulu_mega.config.effects import Effect
from tulu_mega.config.lora import LoraSettings
from tulu_mega.config.megatron_fields import ACTIVATION, MEGATRON
from tulu_mega.config.precision import PrecisionSettings
from tulu_mega.config.sections import (
    CheckpointSettings,
    DataSettings,
    HeldOutSettings,
    ModelSettings,
    OptimSettings,
    ParallelSettings,
    PreferenceDataSettings,
    Section,
    TrainSettings,
    WandbSettings,
    WatchdogSettings,
)
from tulu_mega.config.training_fields import DDP, MOMENTS, OFFLOAD, OFFLOADED, OPTIMIZER


class EngineSettings(Section):
    """What every command that builds a Megatron model shares."""

    model: ModelSettings
    parallel: Annotated[ParallelSettings, Effect.NONE] = ParallelSettings()
    precision: PrecisionSettings = PrecisionSettings()
    megatron: dict[str, Any] = {}
    """Fields of megatron-core's TransformerConfig that no setting of ours names."""
    watchdog: Annotated[WatchdogSettings, Effect.NONE] = WatchdogSettings()

    @field_validator("megatron")
    @classmethod
    def _known_fields(cls, table: dict[str, Any]) -> dict[str, Any]:
        MEGATRON.check(table)
        return table

    @model_validator(mode="after")
    def _what_is_recomputed_can_be(self) -> EngineSettings:
        modules = self.model.recomputed.modules
        if "activation" in modules and (others := sorted(ACTIVATION & self.megatron.keys())):
            raise ValueError(
                f"model.recompute = 'activation' computes our own SwiGLU again, but [megatron] {', '.join(others)} takes "
                "megatron-core's; leave either out"
            )
        if self.precision.recipe == "delayed" and (several := sorted(modules & {"activation", "layernorm"})):
            raise ValueError(
                f"model.recompute = {', '.join(several)} does not go with precision.fp8 = 'delayed', whose scales would be taken "
                "twice; choose 'tensorwise' or 'blockwise', or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _gradients_are_not_coarser_than_asked(self) -> EngineSettings:
        if self.parallel.grad_dtype == "bf16" and self.model.dtype != "bf16":
            raise ValueError(f"parallel.grad_dtype = 'bf16' needs model.dtype = 'bf16', got {self.model.dtype!r}; leave it out")
        return self

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


def _names(value: Any) -> Any:
    """``"model,data.train"`` as a list."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


class RunSettings(EngineSettings):
    """What every command shares that trains."""

    flags_alone: ClassVar[tuple[str, ...]] = ("accept_changes",)

    run_dir: Annotated[str, Effect.NONE]
    """Directory of this run: config.json, metrics.jsonl, checkpoints/, hf/, logs/. A run that is there already goes on."""
    accept_changes: Annotated[list[str], BeforeValidator(_names), Effect.NONE, Field(exclude=True)] = []
    """What was changed on purpose since this run began, such as `model,data.train`: settings, or sections for all in them, whose
    files are taken as they are now. On the command line only; RUN_DIR/pins.json records it. Once accepted, a further change of
    the same setting is accepted by the name that its refusal prints."""
    seed: int = 123
    optim: OptimSettings = OptimSettings()
    lora: LoraSettings | None = None
    """Train low-rank adapters beside the frozen weights; unset, all weights are trained."""
    ddp: Annotated[dict[str, Any], Effect.NONE] = {}
    """Fields of megatron-core's DistributedDataParallelConfig that no setting of ours names."""
    optimizer: dict[str, Any] = {}
    """Fields of megatron-core's OptimizerConfig that no setting of ours names."""
    checkpoint: Annotated[CheckpointSettings, Effect.NONE] = CheckpointSettings()
    wandb: Annotated[WandbSettings, Effect.NONE] = WandbSettings()

    @field_validator("ddp", "optimizer")
    @classmethod
    def _known_fields_of_training(cls, table: dict[str, Any], which: ValidationInfo) -> dict[str, Any]:
        (DDP if which.field_name == "ddp" else OPTIMIZER).check(table)
        return table

    @model_validator(mode="after")
    def _fp8_has_its_optimizer(self) -> RunSettings:
        if self.precision.fp8_param_gather and self.optim.name != "adamw":
            raise ValueError(f"precision.fp8_param_gather needs optim.name = 'adamw', got {self.optim.name!r}; change either")
        return self

    @model_validator(mode="after")
    def _moments_are_there_and_shared_out(self) -> RunSettings:
        if self.optim.moments == "bf16" and not (self.parallel.distributed_optimizer and self.optim.name == "adamw"):
            raise ValueError(
                f"optim.moments = 'bf16' needs optim.name = 'adamw', got {self.optim.name!r}, and "
                "parallel.distributed_optimizer; set them, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _adapters_lie_beside_plain_weights(self) -> RunSettings:
        if self.lora and self.lora.quantized and self.precision.recipe is not None:
            raise ValueError("lora.base_precision does not go with precision.fp8: blocks are made whole for bf16; leave one out")
        if self.lora and self.precision.fp8_param_gather:
            raise ValueError("[lora] does not go with precision.fp8_param_gather: frozen weights are gathered once; leave it out")
        return self

    @model_validator(mode="after")
    def _moments_have_one_optimizer(self) -> RunSettings:
        theirs = self.optimizer.get("use_precision_aware_optimizer", False)
        if theirs and self.optim.moments == "bf16":
            raise ValueError(
                "optim.moments = 'bf16' is our own AdamW, [optimizer] use_precision_aware_optimizer Transformer Engine's; leave "
                "either out"
            )
        if theirs and self.checkpoint.format == "same_layout":  # megatron-core's form of it stumbles over marks of padding
            raise ValueError(
                "checkpoint.format = 'same_layout' does not go with [optimizer] use_precision_aware_optimizer, whose state "
                "could not be read again; choose 'reshardable'"
            )
        if self.optimizer.get(OFFLOAD, False):  # of which the next one tells
            return self
        if not theirs and (given := [name for name in MOMENTS if name in self.optimizer]):
            raise ValueError(
                f"[optimizer] {', '.join(given)}: only with use_precision_aware_optimizer = true; set it, or optim.moments "
                "in their place"
            )
        return self

    @model_validator(mode="after")
    def _state_on_the_host_is_whole(self) -> RunSettings:
        table = self.optimizer
        if not table.get(OFFLOAD, False):
            if given := [name for name in OFFLOADED if name in table]:
                raise ValueError(f"[optimizer] {', '.join(given)}: only with {OFFLOAD} = true; set it, or leave them out")
            return self
        problems = []
        if not 0 < table.get("optimizer_offload_fraction", 0.0) <= 1:
            problems.append("optimizer_offload_fraction, above 0 and at most 1 (megatron-core's default moves nothing)")
        if not table.get("use_precision_aware_optimizer", False):
            problems.append("use_precision_aware_optimizer = true")
        if given := [name for name in MOMENTS if table.get(name, "fp32") != "fp32"]:
            problems.append(f"moments in float32, not {', '.join(given)}")
        if self.model.dtype != "bf16":
            problems.append("model.dtype = 'bf16'")
        if not (self.optim.name == "adamw" and self.parallel.distributed_optimizer):
            problems.append("optim.name = 'adamw' and parallel.distributed_optimizer")
        if self.precision.fp8_param_gather:
            problems.append("precision.fp8_param_gather = false: its main parameters are made of weights in bf16")
        if problems:
            raise ValueError(f"[optimizer] {OFFLOAD} needs {'; '.join(problems)}")
        return self


class StageSettings(RunSettings):
    """What every stage shares that learns from a fixed data set."""

    data: DataSettings
    train: TrainSettings = TrainSettings()
    heldout: Annotated[HeldOutSettings | None, Effect.NONE] = None
    """Rows to evaluate on while training."""

class OnePass(TrainSettings):
    epochs: Annotated[float, Field(gt=0), Effect.LENGTH] = 1.0
    """Passes over the data; ignored when `steps` is given."""


class PreferenceStageSettings(StageSettings):
    """What the stages share that learn from pairs."""

    data: PreferenceDataSettings
    train: OnePass = OnePass()
    heldout: Annotated[HeldOutSettings | None, Effect.NONE] = None
    """Pairs to evaluate on while training."""
