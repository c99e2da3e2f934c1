"""The settings, section by section. Strict, frozen, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from tulu_mega.config.effects import Effect
from tulu_mega.config.recompute import Recompute, Recomputed, recomputed
from tulu_mega.errors import UserError

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, le=1 - 2.0**-24)]
"""A share that float32 can tell from 1: an average with that factor never changes, and Adam's correction of it divides by 0."""


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _sensible_amounts(sources: Any) -> Any:
    if isinstance(sources, dict):
        wrong = [f"{name!r} = {amount!r}" for name, amount in sources.items() if not _is_amount(amount)]
        if wrong or not sources:
            raise ValueError(
                f"{', '.join(wrong) or 'an empty table'}: expected of each source a number of rows (500) "
                "or a share with a point (0.5, 3.0), above 0"
            )
    return sources


Sources = Annotated[str | list[str] | dict[str, int | float], BeforeValidator(_sensible_amounts)]
"""Files or data sets, or a table of them with amounts."""
AskedTemplate = Annotated[
    Literal["auto", "tulu", "tokenizer"],
    Field(description="Chat template: Tulu's, the one the tokenizer ships, or that and Tulu's where it ships none (`auto`)."),
]
"""Of every command: a model is asked under the template that it was trained with."""
FormName = Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "hh", "ultrafeedback", "tokens"]
"""Forms of rows, as public data sets have them."""


@dataclass(frozen=True)
class Alone:
    """Mark of a table that may be given as a text alone: the setting which is meant then, as `Section.alone`."""

    setting: str


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are not coerced, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
    alone: ClassVar[str] = ""
    """The setting meant when the section is given as a text (or list) alone: ``model = "dir"`` is ``model.path = "dir"``."""
    flags_alone: ClassVar[tuple[str, ...]] = ()
    """Settings that are for the command line: in a file they would outlive what they are meant for."""

    @model_validator(mode="before")
    @classmethod
    def _setting_alone(cls, value: Any) -> Any:
        return {cls.alone: value} if cls.alone and isinstance(value, str | list) else value


class ModelSettings(Section):
    alone: ClassVar[str] = "path"
    path: Annotated[str, Effect.CONTENT]
    """Directory of a Hugging Face model (config.json, *.safetensors, tokenizer), or a hub name."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of parameters and activations while training; bf16 keeps fp32 main parameters."""
    spec: Annotated[Literal["auto", "local", "te"], Effect.NONE] = "auto"
    """Layer implementation: Transformer Engine (`te`), our own (`local`), or TE when importable."""
    attention: Annotated[Literal["auto", "te", "flash3", "flash2", "varlen", "sdpa"], Effect.NONE] = "auto"
    """Attention: Transformer Engine's (in its own layers only), FlashAttention 3 or 2, torch's for packed rows (`varlen`) or
    segment by segment (`sdpa`); `auto` takes the fastest of them that is there and can do it."""
    kernels: Annotated[Literal["auto", "triton", "torch"], Effect.NONE] = "auto"
    """Our own kernels: Triton's on GPUs where it can be imported and torch elsewhere (`auto`), or one of them everywhere."""
    recompute: Annotated[Recompute, Effect.NONE] = "none"
    """Activations that are computed again backward: none, the attention core (`selective`; worth nothing where attention is
    fused), whole layers (`full`), or a list of `layernorm`, `activation` (of the feed-forward), `mlp` and `core_attn`."""
    recompute_layers: Annotated[PositiveInt | None, Effect.NONE] = None
    """Layers that `full` computes again, the first of each chunk of the model; all of them when unset."""
    trust_remote_code: Annotated[bool, Effect.NONE] = False
    """Let transformers run code from the model directory (tokenizer, config)."""

    @property
    def recomputed(self) -> Recomputed:
        """What is computed again."""
        return recomputed(self.recompute, self.recompute_layers)

    @model_validator(mode="after")
    def _layers_of_full(self) -> ModelSettings:
        recomputed(self.recompute, self.recompute_layers)
        return self


class DataSettings(Section):
    pairs: ClassVar[bool] = False
    """Whether rows are pairs of a chosen and a rejected response."""
    train: Annotated[Sources, Effect.CONTENT]
    """JSONL (also under gzip or zstd) or Parquet file(s), or hub data set names; rows of `messages`, of `input_ids` and `labels`,
    or of another form (see `format`). As a table, each with its amount: 500 is a count of rows, 0.5 half of them, 3.0 three times
    all of them."""
    split: Annotated[str | dict[str, str], Effect.CONTENT] = "train"
    """Split of hub data sets; a table names the split of some, the others' is `train`."""
    seed: int = 42
    """Decides which rows are drawn where `train` gives amounts."""
    format: FormName = "auto"
    """Form of the rows: `messages` (OpenAI's and Tulu's), `sharegpt`, `alpaca`, `prompt` (TRL's, with a completion, or with
    chosen and rejected), `hh` (HH-RLHF), `ultrafeedback`, `tokens`; `auto` tells each row's by its columns."""
    template: AskedTemplate = "auto"
    tokenizer: Annotated[str | None, Effect.CONTENT] = None
    """Directory or hub name of the tokenizer; the model's own when unset. The exported model has it."""
    max_length: PositiveInt = 4096
    """Longest sequence in tokens."""
    overlong: Literal["truncate", "reject"] = "truncate"
    """Rows longer than `max_length`: cut on the right, or left out."""
    malformed: Literal["error", "reject"] = "error"
    """Rows that cannot be read or rendered: `error` stops and names them, `reject` leaves them out and lists them."""
    rewritten: Literal["leave", "split"] = "split"
    """Turns of the assistant that the chat template writes otherwise once more follows, as templates do that drop earlier
    reasoning: each the last turn of a row of its own, as the model is asked for it (`split`), or not trained, but counted
    (`leave`)."""
    cache: Annotated[str | None, Effect.NONE] = None
    """Directory where tokenised data is kept by content, for all runs that name it; unset, each run keeps its own."""
    pack_length: Annotated[PositiveInt | None, Effect.NONE] = None
    """Tokens a packed micro-batch may hold on one data-parallel rank; `max_length` when unset."""
    shuffle: bool = True
    """Draw a new seeded order each epoch; otherwise rows come in file order."""
    workers: Annotated[PositiveInt | None, Effect.NONE] = None
    """Processes that tokenise; the machine's cores when unset."""


class PreferenceDataSettings(DataSettings):
    pairs: ClassVar[bool] = True
    train: Annotated[Sources, Effect.CONTENT]
    """JSONL (also under gzip or zstd) or Parquet file(s), or hub data set names; rows of `chosen` and `rejected`, each a list of
    messages that part at the last one (messages or a text in `prompt` come before both where they do not begin with it), of
    `chosen_input_ids`, `chosen_labels`, `rejected_input_ids`, `rejected_labels`, or of another form (see `format`). As a table,
    each with its amount: 500 is a count of rows, 0.5 half of them, 3.0 three times all of them."""
    max_length: PositiveInt = 2048
    """Longest sequence in tokens, prompt and response."""
    pack_length: Annotated[PositiveInt | None, Effect.NONE] = None
    """Tokens a packed micro-batch may hold on one data-parallel rank; twice `max_length` when unset, so that any pair fits."""
    rewritten: Literal["leave"] = "leave"
    """Turns of the assistant that the chat template writes otherwise once more follows are not trained, but counted: the two
    sides part at the last turn."""
    turns: Literal["all", "last"] = "all"
    """Assistant turns whose log-probabilities count: all of them, as Tulu 3 was trained, or the last alone, where the two sides
    part. (A reward model's score is read at the end, whatever this says.)"""
    margin: str | None = None
    """Column with the number by which the chosen response is to be better (reward models only); unset, no margin."""


class ParallelSettings(Section):
    tensor: PositiveInt = 1
    """Tensor parallel size (TP)."""
    pipeline: PositiveInt = 1
    """Pipeline parallel size (PP)."""
    virtual_pipeline: PositiveInt = 1
    """Model chunks per pipeline rank (VPP, the interleaved schedule); micro-batches are then a multiple of `pipeline`."""
    first_stage_layers: PositiveInt | None = None
    """Layers on the first pipeline rank, all its chunks together; chosen to balance the stages when unset."""
    last_stage_layers: PositiveInt | None = None
    """Layers on the last pipeline rank, all its chunks together; chosen to balance the stages when unset."""
    context: PositiveInt = 1
    """Context parallel size (CP)."""
    data: PositiveInt | None = None
    """Data parallel size (DP). Unset: under torchrun the processes that the layout leaves, else 1."""
    sequence: bool = True
    """Sequence parallelism inside the tensor group (no effect when tensor is 1)."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel group."""
    overlap_grad_reduce: bool = False
    """Sum gradients over DP x CP bucket by bucket while the last backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass goes on (distributed optimizer only)."""
    bucket_size: PositiveInt | None = None
    """Parameters in a bucket of `overlap_grad_reduce`; megatron-core's choice when unset."""
    grad_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients of bf16 parameters are added up, over micro-batches and DP x CP. `bf16` takes half the memory and
    half the time to send, and rounds after each addition."""

    @property
    def model_parallel(self) -> int:
        """Processes that hold one replica of the model: TP x PP x CP."""
        return self.tensor * self.pipeline * self.context

    def replicas(self, world: int) -> int:
        """The data parallel size that fills a world.

        Args:
            world: its processes.

        Raises:
            UserError: the layout does not divide the world, or is for one of another size.
        """
        replica = self.model_parallel
        layout = f"tensor {self.tensor} x pipeline {self.pipeline} x context {self.context}"
        if world % replica:
            raise UserError(
                f"parallel: {layout} = {replica} processes a replica do not divide the world of {world}; change either"
            )
        if self.data not in (None, world // replica):
            raise UserError(
                f"parallel: {layout} x data {self.data} = {self.data * replica} processes, but torchrun started {world}; "
                f"set parallel.data to {world // replica}, or start {self.data * replica}"
            )
        return world // replica

    @model_validator(mode="after")
    def _consistent(self) -> ParallelSettings:
        problems = []
        if self.pipeline == 1:
            if self.virtual_pipeline > 1:
                problems.append(f"virtual_pipeline = {self.virtual_pipeline} needs pipeline of at least 2; raise it")
            for name in ("first_stage_layers", "last_stage_layers"):
                if getattr(self, name) is not None:
                    problems.append(f"{name} needs pipeline of at least 2; leave it out")
        for name in ("first_stage_layers", "last_stage_layers"):
            count = getattr(self, name)
            if count is not None and count % self.virtual_pipeline:
                problems.append(f"{name} = {count} does not divide into virtual_pipeline = {self.virtual_pipeline} chunks")
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            problems.append("overlap_param_gather needs distributed_optimizer and overlap_grad_reduce; turn them on")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class SpikeSettings(Section):
    alone: ClassVar[str] = "action"
    action: Literal["warn", "skip", "stop"] = "warn"
    """When loss or gradient norm leap: `warn`, `skip` (warn and leave the update out) or `stop` (save the state before it)."""
    factor: Annotated[float, Field(ge=0)] = 10.0
    """Multiple of the last steps' median from which on a value is a leap; 0 looks for none."""
    window: PositiveInt = 50
    """Steps (`grpo` and `ppo`: updates) whose median is taken."""


class StragglerSettings(Section):
    every: Annotated[int, Field(ge=0)] | None = None
    """Steps between comparisons of the ranks' speed; 0: none. Unset: the smallest multiple of `log_every` that is at least 10."""
    factor: Annotated[float, Field(ge=1)] = 1.5
    """Multiple of the median's time from which on a rank is too slow."""
    reports: PositiveInt = 3
    """Reports in a row in which a rank is too slow before a warning names it."""


class ProfileSettings(Section):
    step: PositiveInt
    """First step (from 1) that is profiled; the first steps of a run are slower than the others."""
    steps: PositiveInt = 1
    """Steps in a trace, one behind the other."""
    ranks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    """Ranks that write a trace. The others wait for them at the next collective."""

    @field_validator("ranks")
    @classmethod
    def _each_once(cls, ranks: list[int]) -> list[int]:
        if len(set(ranks)) < len(ranks):
            raise ValueError(f"{ranks}: a rank is named more than once; name each rank once")
        return ranks

    @property
    def last(self) -> int:
        """Last step that is profiled."""
        return self.step + self.steps - 1

    @property
    def window(self) -> str:
        """The steps in words."""
        return f"step {self.step:,}" if self.steps == 1 else f"steps {self.step:,} to {self.last:,}"


class TrainSettings(Section):
    steps: Annotated[PositiveInt | None, Effect.LENGTH] = None
    """Optimizer steps; unset, the steps that `epochs` take."""
    epochs: Annotated[float, Field(gt=0), Effect.LENGTH] = 2.0
    """Passes over the data; ignored when `steps` is given."""
    global_batch: PositiveInt = 128
    """Rows (conversations, or pairs) in an optimizer step, over all ranks."""
    micro_batches: Annotated[PositiveInt | None, Effect.NONE] = None
    """Packed micro-batches a step on each data-parallel rank; the fewest that hold the batch when unset."""
    max_skipped: Annotated[PositiveInt, Effect.NONE] = 5
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    spike: Annotated[SpikeSettings, Effect.NONE] = SpikeSettings()
    straggler: Annotated[StragglerSettings, Effect.NONE] = StragglerSettings()
    log_every: Annotated[PositiveInt, Effect.NONE] = 1
    """Steps between console lines (metrics.jsonl has every step)."""
    profile: Annotated[ProfileSettings | None, Effect.NONE] = None
    """Traces of chosen steps by torch's profiler, in RUN_DIR/profile; `report` shows them."""


Reduction = Literal["sum", "token_mean"]


class SftTrainSettings(TrainSettings):
    reduction: Reduction = "sum"
    """Denominator of the summed loss: sequences of the global batch (Tulu 3) or its supervised tokens."""


class OptimSettings(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(ge=0)] = 5e-6
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Fraction = 0.03
    """Share of the steps in which the rate rises linearly from 0."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Rate at the end of the decay, at most `lr`."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[float, Field(ge=1e-30)] = 1e-8
    """Added to the root of the second moment; at least what float32 can add to 0 and divide by."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    moments: Literal["fp32", "bf16"] = "fp32"
    """What AdamW's two moments are kept in between steps; `bf16` takes 4 bytes a parameter fewer, is rounded at random so that
    means stay true, and needs `parallel.distributed_optimizer`."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""

    @model_validator(mode="before")
    @classmethod
    def _list_of_betas(cls, value: Any) -> Any:  # TOML has lists only; strict pydantic wants a tuple
        if isinstance(value, dict) and isinstance(value.get("betas"), list):
            return {**value, "betas": tuple(value["betas"])}
        return value

    @model_validator(mode="after")
    def _decays_downwards(self) -> OptimSettings:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr:g} is above lr = {self.lr:g}; expected at most lr")
        return self


class ReferenceSettings(Section):
    cache: str | None = None
    """Directory where reference log-probabilities are kept by content (weights, data, tokenizer), for all runs that name it;
    unset, each run keeps its own in RUN_DIR/reference."""
    only: bool = False
    """Fill the cache and stop, so that the reference is scored by a job of its own, under a layout of its own."""


class HeldOutSettings(Section):
    alone: ClassVar[str] = "data"
    data: str | list[str]
    """JSONL or Parquet file(s), or hub data set names, of rows like `data.train`'s that are not trained on."""
    split: str = "test"
    """Split of hub data sets."""
    every: PositiveInt = 100
    """Steps between evaluations. One comes before the first step and one after the last in any case."""
    batch: PositiveInt = 256
    """Rows (conversations, or pairs) evaluated at once, over all ranks; the result does not depend on it."""


class CheckpointSettings(Section):
    every: PositiveInt | None = None
    """Steps between checkpoints; the last step is always saved. Unset: the last step only."""
    keep: PositiveInt = 2
    """Newest complete checkpoints kept on disk, and beside them the newest healthy one: with finite weights, and from before
    updates that were left out."""
    format: Literal["reshardable", "same_layout"] = "reshardable"
    """What the optimizer's state is written as: `reshardable`, parameter by parameter, resumes under any layout; `same_layout`,
    in the ranks' own buckets, under the same tensor, pipeline and context sizes, stages and buckets only. Neither gathers."""
    asynchronous: bool = False
    """Write while training goes on, from copies in main memory; one save at a time, the next waits for it."""
    grace: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that ranks have to end and save their step when the launcher is asked to end (SIGTERM, SIGUSR1)."""
    export: bool = True
    """Write the trained model in Hugging Face format to RUN_DIR/hf at the end."""
    export_dtype: Literal["model", "bf16", "fp32"] = "model"
    """Precision of the exported model; `model` keeps the training precision."""


class WatchdogSettings(Section):
    alone: ClassVar[str] = "timeout"
    timeout: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds a rank may go without progress (a micro-batch, an update, a checkpoint, a round of generation); then each rank
    prints where it is and which ranks it waits for, and the run ends. 0: wait for ever."""

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return {"timeout": value} if isinstance(value, int | float) else value


class WandbSettings(Section):
    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "tulu_mega"
    name: str | None = None
    """Run name; the run directory's name when unset."""
