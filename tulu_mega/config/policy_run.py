"""Settings of the commands that train a policy on responses of their own servers."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tulu_mega.config.effects import Effect
from tulu_mega.config.rollout import PolicyLossSettings, RolloutSettings, SamplingSettings, Seconds, check_servers
from tulu_mega.config.run import RunSettings
from tulu_mega.config.sections import (
    AskedTemplate,
    FormName,
    Fraction,
    OptimSettings,
    PositiveInt,
    ProfileSettings,
    Section,
    Sources,
    SpikeSettings,
    StragglerSettings,
)
from tulu_mega.config.workload import ValueWork, Workload

MEAN_LENGTH = 200
"""Tokens of a prompt of Tulu 3's."""


class PromptDataSettings(Section):
    alone: ClassVar[str] = "train"
    train: Annotated[Sources, Effect.CONTENT]
    """JSONL (also under gzip or zstd) or Parquet file(s), or hub data set names; rows of `messages` (or a prompt of another form,
    see `format`), `ground_truth` and `dataset` (the verifier, or a list of them). As a table, each with its amount: 500 is a
    count of rows, 0.5 half of them, 3.0 three times all of them."""
    split: Annotated[str | dict[str, str], Effect.CONTENT] = "train"
    """Split of hub data sets; a table names the split of some, the others' is `train`."""
    seed: int = 42
    """Decides which rows are drawn where `train` gives amounts."""
    format: FormName = "auto"
    """Form of the prompts: `messages`, `sharegpt`, `alpaca` (its instruction), `prompt` (TRL's: a text is the user's message);
    `auto` tells each row's by its columns."""
    template: AskedTemplate = "auto"
    tokenizer: Annotated[str | None, Effect.CONTENT] = None
    """Directory or hub name of the tokenizer; the model's own when unset. Its eos token ends a response, and the exported model
    has it."""
    max_prompt: PositiveInt = 2048
    """Longest prompt in tokens; rows with a longer one are left out, and listed in RUN_DIR/data/rejects.jsonl."""
    malformed: Literal["error", "reject"] = "error"
    """Rows that cannot be read, rendered or judged: stop and name them, or leave them out."""
    pack_length: Annotated[PositiveInt | None, Effect.NONE] = None
    """Tokens a packed micro-batch may hold on one data-parallel rank; the longest prompt and response together when unset."""
    shuffle: bool = True
    """Draw a new seeded order each epoch; otherwise rows come in file order."""


class RewardSettings(Section):
    scale: float = 10.0
    """Factor of the verifiers' weighted sum (Tulu 3: 10 for a right answer)."""
    weights: dict[str, float] = {}
    """Verifier and the factor of its score, where a row names several; 1 where not named."""
    custom: Annotated[dict[str, str], Effect.CONTENT] = {}
    """Verifiers of your own: name in the `dataset` column = "module:function"."""
    aliases: dict[str, str] = {}
    """Name in the `dataset` column = verifier, such as ifeval = "ifeval_2024"."""
    math_accepts: list[Literal["unevaluated", "several"]] = []
    """What the verifier `math` takes as published graders do, though it invites cheating: answers left to be calculated ("2+2"),
    and several answers of which one is right. Both repeat a published run."""
    code_objects: bool = False
    """Serve `python_code`'s tests objects of the program's classes: methods, attributes, length, items. Without it such tests
    fail, counted as `unserved`."""
    workers: Annotated[PositiveInt | None, Effect.NONE] = None
    """Processes that verify; the machine's cores when unset."""
    timeout: Annotated[Seconds, Effect.NONE] = 30.0
    """Seconds a response's verification may take; a sample that takes longer is taken out, not scored 0."""
    memory_mib: Annotated[PositiveInt, Effect.NONE] = 4096
    """Address space of each of these processes, mebibytes."""
    model: Annotated[str | None, Effect.CONTENT] = None
    """Directory of a reward model (`tulu-mega rm`) whose score is added."""
    model_weight: float = 1.0
    """Factor of the reward model's score."""
    shuffle: bool = False
    """A control: each prompt's rewards, `policy.overlong_reward` among them, are dealt out at random among its responses (of one
    response each: among the prompts of a round), so that there is nothing to learn."""


class PolicySpikeSettings(SpikeSettings):
    action: Literal["warn", "skip", "stop"] = "warn"
    """When the gradient norm leaps (a policy's loss means nothing): say so; leave the update out as well; or leave it and the
    step's later ones out, save and stop."""


class PolicyTrainSettings(Section):
    steps: Annotated[PositiveInt | None, Effect.LENGTH] = None
    """Rounds of generation and training; unset, as many as `epochs` take."""
    epochs: Annotated[float, Field(gt=0), Effect.LENGTH] = 1.0
    """Passes over the prompts, which set the number of steps at `prompts` a step. Prompts that `refills` draw are not counted, so
    a run may ask more. Ignored when `steps` is given."""
    prompts: PositiveInt = 48
    """Prompts in a step, each with `sampling.samples` responses."""
    mini_batches: PositiveInt = 2
    """Optimizer steps that a step's responses are split into."""
    passes: PositiveInt = 1
    """Times that a step's responses are trained on."""
    share_prompts: Annotated[bool, Effect.NONE] = True
    """Have the tokens of a prompt once in a pack for all its responses there. Not under context parallelism, where this changes
    nothing, nor by Transformer Engine's attention: `model.attention = "auto"` takes FlashAttention's or torch's before it."""
    max_policy_lag: Annotated[int, Field(ge=0)] = 0
    """Steps by which the weights that answer a prompt may be older than those that train on it. 0: servers and trainer take
    turns; 1: servers answer the next step's prompts while a step trains; 2 and more: verdicts, too, may be late by a step."""
    filter_equal: bool = True
    """Leave out prompts whose responses all have the same reward, from which nothing can be learned, and draw others."""
    refills: Annotated[int, Field(ge=0)] = 3
    """Times that a step may draw other prompts in their place."""
    max_skipped: Annotated[PositiveInt, Effect.NONE] = 5
    """Stop after this many updates in a row whose loss or gradient is not finite, or steps in a row without any to learn from."""
    spike: Annotated[PolicySpikeSettings, Effect.NONE] = PolicySpikeSettings()
    straggler: Annotated[StragglerSettings, Effect.NONE] = StragglerSettings()
    log_every: Annotated[PositiveInt, Effect.NONE] = 1
    """Steps between console lines (metrics.jsonl has every step)."""
    profile: Annotated[ProfileSettings | None, Effect.NONE] = None
    """Traces of chosen steps by torch's profiler, in RUN_DIR/profile; `report` shows them."""
    rollouts_every: Annotated[PositiveInt, Effect.NONE] = 1
    """Steps between files of responses in RUN_DIR/rollouts. The last step has a file, and so has every step with a problem."""


class PromptHeldOutSettings(Section):
    alone: ClassVar[str] = "data"
    data: str | list[str]
    """JSONL or Parquet file(s), or hub data set names, of rows like `data.train`'s that are not trained on."""
    split: str = "test"
    """Split of hub data sets."""
    every: PositiveInt = 25
    """Steps between greedy evaluations; there is one before the first step and one after the last."""


class PolicyOptimSettings(OptimSettings):
    lr: Annotated[float, Field(ge=0)] = 5e-7
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    warmup: Fraction = 0.0
    """Share of the steps in which the rate rises linearly from 0."""


class PolicyRunSettings(RunSettings):
    """What the stages share that train a policy on the responses of its own servers."""

    data: PromptDataSettings
    heldout: Annotated[PromptHeldOutSettings | None, Effect.NONE] = None
    """Prompts to evaluate on while training, greedily."""
    rollout: RolloutSettings = RolloutSettings()
    sampling: SamplingSettings = SamplingSettings()
    policy: PolicyLossSettings = PolicyLossSettings()
    rewards: RewardSettings = RewardSettings()
    train: PolicyTrainSettings = PolicyTrainSettings()
    optim: PolicyOptimSettings = PolicyOptimSettings()
    restarts: Annotated[int, Field(ge=0), Effect.NONE] = 0
    """Times that the launcher starts the ranks anew after one died; they go on from the newest checkpoint, the servers stay."""

    @model_validator(mode="after")
    def _servers_can_be(self) -> PolicyRunSettings:
        check_servers(self.model, self.rollout)
        if self.lora and self.lora.quantized and self.rollout.adapters != "merged":
            raise ValueError(
                f"lora.base_precision = {self.lora.base_precision!r} needs rollout.adapters = 'merged', got "
                f"{self.rollout.adapters!r}: servers' own weights are not what the trainer's blocks stand for"
            )
        if self.lora and self.rollout.quantization == "fp8":
            raise ValueError("[lora] does not go with rollout.quantization = 'fp8' yet, as weights go out merged; leave it out")
        return self

    @property
    def longest(self) -> int:
        """Tokens that prompt and response may have together."""
        return self.data.max_prompt + self.sampling.max_tokens


def sampled(settings: PolicyRunSettings, scorings: int, value: ValueWork | None = None) -> Workload:
    """Prompts, to which servers sample groups of responses.

    Args:
        scorings: times a step that log-probabilities are computed without training.
        value: a value model that trains beside.
    """
    data, sampling, policy, train = settings.data, settings.sampling, settings.policy, settings.train
    return Workload(
        rows=train.prompts,
        mean_length=MEAN_LENGTH,
        longest_row=data.max_prompt,
        samples=sampling.samples,
        longest_response=sampling.max_tokens,
        pack_length=data.pack_length,
        mini_batches=train.mini_batches,
        passes=train.passes,
        scorings=scorings,
        reference=policy.reads_reference,
        rewards=settings.rewards.model,
        value=value,
        adapters=settings.lora is not None,
        entropy=policy.entropy > 0,
        rollout=settings.rollout,
        beside=train.max_policy_lag > 0,
    )


def steps_of(settings: PolicyRunSettings, prompts: int) -> int:
    """The steps of a run.

    Args:
        prompts: rows that it trains on.
    """
    train = settings.train
    return train.steps or math.ceil(round(train.epochs * prompts / train.prompts, 6))


def restarts(settings: PolicyRunSettings) -> int:
    """Times that the launcher starts the ranks anew."""
    return settings.restarts
