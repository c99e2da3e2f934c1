"""The settings, section by section. Strict, frozen, importable without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are not coerced, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelSettings(Section):
    path: str
    """Directory of a Hugging Face model (config.json, *.safetensors, tokenizer), or a hub name."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of parameters and activations while training; bf16 keeps fp32 main parameters."""
    spec: Literal["auto", "local", "te"] = "auto"
    """Layer implementation: Transformer Engine (`te`), our own over torch SDPA (`local`), or TE when importable."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: nothing, the attention core, or whole layers."""
    trust_remote_code: bool = False
    """Let transformers run code from the model directory (tokenizer, config)."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataSettings(Section):
    train: str | list[str]
    """JSONL or Parquet file(s), or a hub data set name; rows of `messages`, or of `input_ids` and `labels`."""
    split: str = "train"
    """Split of a hub data set."""
    template: Literal["tulu", "tokenizer"] = "tulu"
    """Chat template: Tulu's, or the one the tokenizer ships (must mark the assistant's tokens)."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer; the model's own when unset."""
    max_length: PositiveInt = 4096
    """Longest sequence in tokens; longer rows are truncated on the right."""
    pack_length: PositiveInt | None = None
    """Tokens a packed micro-batch may hold on one data-parallel rank; `max_length` when unset."""
    shuffle: bool = True
    """Draw a new seeded order each epoch; otherwise rows come in file order."""
    workers: PositiveInt | None = None
    """Processes that tokenise; the machine's cores when unset."""


class ParallelSettings(Section):
    tensor: PositiveInt = 1
    """Tensor parallel size (TP)."""
    pipeline: PositiveInt = 1
    """Pipeline parallel size (PP)."""
    virtual_pipeline: PositiveInt = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    context: PositiveInt = 1
    """Context parallel size (CP)."""
    data: PositiveInt | None = None
    """Data parallel size (DP); under torchrun what is left of the world, alone 1."""
    sequence: bool = True
    """Sequence parallelism inside the tensor group (no effect when tensor is 1)."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel group."""

    @property
    def model_parallel(self) -> int:
        """Processes that hold one replica of the model: TP x PP x CP."""
        return self.tensor * self.pipeline * self.context

    @model_validator(mode="after")
    def _available(self) -> ParallelSettings:
        problems = [
            f"{name} = {getattr(self, name)} is not available yet: use 1"
            for name in ("virtual_pipeline", "context")
            if getattr(self, name) != 1
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


class TrainSettings(Section):
    steps: PositiveInt | None = None
    """Optimizer steps; unset, the steps that `epochs` take."""
    epochs: Annotated[float, Field(gt=0)] = 2.0
    """Passes over the data; ignored when `steps` is given."""
    global_batch: PositiveInt = 128
    """Sequences in an optimizer step, over all ranks."""
    micro_batches: PositiveInt | None = None
    """Packed micro-batches a step on each data-parallel rank; the fewest that hold the batch when unset."""
    reduction: Literal["sum", "token_mean"] = "sum"
    """Denominator of the summed loss: sequences of the global batch (Tulu 3) or its supervised tokens."""
    max_skipped: PositiveInt = 5
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    log_every: PositiveInt = 1
    """Steps between console lines (metrics.jsonl has every step)."""


class OptimSettings(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(ge=0)] = 5e-6
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Fraction = 0.03
    """Share of the steps in which the rate rises linearly from 0."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Rate at the end of the decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""

    @model_validator(mode="before")
    @classmethod
    def _list_of_betas(cls, value: Any) -> Any:  # TOML has lists only; strict pydantic wants a tuple
        if isinstance(value, dict) and isinstance(value.get("betas"), list):
            return {**value, "betas": tuple(value["betas"])}
        return value


class CheckpointSettings(Section):
    every: PositiveInt | None = None
    """Steps between checkpoints; the last step is always saved. Unset: the last step only."""
    keep: PositiveInt = 2
    """Newest complete checkpoints kept on disk."""
    export: bool = True
    """Write the trained model in Hugging Face format to RUN_DIR/hf at the end."""
    export_dtype: Literal["model", "bf16", "fp32"] = "model"
    """Precision of the exported model; `model` keeps the training precision."""


class WandbSettings(Section):
    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "tulu_mega"
    name: str | None = None
    """Run name; the run directory's name when unset."""
