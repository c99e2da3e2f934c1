"""What `tulu-mega plan` takes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tulu_mega.config.sections import Alone, PositiveInt, Section
from tulu_mega.config.stages import STAGES


class PlanSettings(Section):
    """`tulu-mega plan CONFIG --gpus N --gpu h100`"""

    config: list[str]
    """TOML file of a stage."""
    stage: Literal[*STAGES] | None = None
    """Which command the file is for; told by its sections or its name when unset."""
    gpus: PositiveInt | None = None
    """GPUs of the whole run, those that generate among them; what the layout takes when unset."""
    gpu: str = "h100"
    """Kind of GPU: a100 (80 GB), h100, h200 or b200, eight to a node; gb200 (NVL72); rtx4090. Runs on CPUs are not planned."""
    rollout_gpu: str | None = None
    """Kind of GPU that generates, where it is another."""
    search: bool = False
    """Rank layouts of these GPUs by predicted time instead of planning the file's own."""
    dry_run: bool = False
    """Build every distinct rank without memory and check that together they are the model, instead of planning."""
    explain: bool = False
    """Print each term of memory and time as well: its formula, and the formula with its numbers."""
    top: PositiveInt = 10
    """Layouts shown by `search`."""
    format: Literal["table", "json"] = "table"
    """What is written to standard output."""
    picture: str | None = None
    """PNG file to draw memory by rank and a step's timeline into."""
    storage: Annotated[float, Field(gt=0)] = 20.0
    """GB/s of the file system that all nodes share, for the seconds of checkpoints: an assumption, to be replaced by yours."""
    rows: PositiveInt | None = None
    """Rows of the data (conversations, pairs, prompts), for the time of the whole stage; known for Tulu 3's own sets."""
    mean_length: PositiveInt | None = None
    """Mean tokens of a conversation or of one side of a pair, of a prompt for `grpo`; Tulu 3's when unset."""
    response_length: PositiveInt | None = None
    """Mean tokens of a sampled response; a quarter of `sampling.max_tokens` when unset."""

    model: Annotated[str | dict[str, Any], Alone("path")] = {}
    """Settings of the file laid over with flags, here and below: --model DIR, --parallel.tensor 8."""
    parallel: dict[str, Any] = {}
    data: dict[str, Any] = {}
    train: dict[str, Any] = {}
    optim: dict[str, Any] = {}
    checkpoint: dict[str, Any] = {}
    precision: Annotated[str | dict[str, Any], Alone("fp8")] = {}
    lora: dict[str, Any] = {}
    ddp: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    megatron: dict[str, Any] = {}
    rollout: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    policy: dict[str, Any] = {}
    value: dict[str, Any] = {}
    rewards: dict[str, Any] = {}

    @field_validator("config")
    @classmethod
    def _one(cls, config: list[str]) -> list[str]:
        if len(config) != 1:
            raise ValueError(f"{len(config)} files; give one, such as: tulu-mega plan examples/tulu3/8b/sft.toml --gpus 8")
        return config
