"""What `tulu-mega ppo` takes, and what a step of it is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError, model_validator
from tulu_kernels.policy_choices import Aggregation

from tulu_mega.config.effects import Effect
from tulu_mega.config.policy_run import PolicyRunSettings, PolicyTrainSettings, sampled
from tulu_mega.config.rollout import PolicyLossSettings, SamplingSettings
from tulu_mega.config.sections import Fraction, ParallelSettings, PositiveInt, Section
from tulu_mega.config.workload import ValueWork, Workload
from tulu_mega.errors import UserError


class PpoSamplingSettings(SamplingSettings):
    samples: PositiveInt = 1
    """Responses to a prompt."""


class PpoPolicySettings(PolicyLossSettings):
    aggregation: Aggregation = "sequence"
    """What both losses are a mean of, over the mini-batch: its response tokens (the value model's: states); its responses, each
    the mean of its tokens; or its responses, each the sum of its tokens over `sampling.max_tokens`."""
    beta: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the divergence from the initial model (k1), which is taken off the reward of each token; 0 does without that
    model."""


class PpoTrainSettings(PolicyTrainSettings):
    prompts: PositiveInt = 224
    """Prompts in a step, each with `sampling.samples` responses."""
    mini_batches: PositiveInt = 1
    """Optimizer steps that a step's responses are split into."""
    passes: PositiveInt = 4
    """Times that a step's responses are trained on."""
    filter_equal: bool = False
    """Leave out prompts whose responses all have the same reward, and draw others; for `sampling.samples` above 1."""


class GaeSettings(Section):
    gamma: Fraction = 1.0
    """Discount of a later reward, a token."""
    lam: Fraction = 0.95
    """Lambda of the policy's advantages: 1 takes whole returns, 0 the value model's word."""
    value_lam: Fraction | None = None
    """Lambda of the returns that the value model learns; `lam` when unset. VAPO takes 1."""
    adaptive: Annotated[float, Field(gt=0)] | None = None
    """VAPO's alpha: a response of n tokens takes `1 - 1 / (alpha n)` for `lam` (there 0.05)."""


class ValueSettings(Section):
    path: Annotated[str, Effect.CONTENT]
    """Directory of the reward model that the value model begins as (`tulu-mega rm`, or anyone's with one label)."""
    parallel: Annotated[ParallelSettings | None, Effect.NONE] = None
    """Its own layout over the same ranks, with the defaults of `parallel` where it says nothing; the policy's when unset."""
    new_head: bool = False
    """Take a language model, too, and draw its head."""
    lr: Annotated[float, Field(ge=0)] | None = None
    """Peak learning rate of its own optimizer, which otherwise follows `optim`; `optim.lr` when unset."""
    coefficient: Annotated[float, Field(gt=0)] = 0.1
    """Weight of its loss."""
    clip: Annotated[float, Field(ge=0)] = 0.2
    """How far a value may move from that before the step's updates and still earn; 0 lets it."""
    updates: PositiveInt = 1
    """Updates of the value model for each of the policy."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps at the beginning in which the value model alone learns."""


class PpoSettings(PolicyRunSettings):
    """`tulu-mega ppo`: reinforcement learning with verifiable rewards and a value model."""

    sampling: PpoSamplingSettings = PpoSamplingSettings()
    policy: PpoPolicySettings = PpoPolicySettings()
    value: ValueSettings
    gae: GaeSettings = GaeSettings()
    train: PpoTrainSettings = PpoTrainSettings()

    @model_validator(mode="after")
    def _groups_can_differ(self) -> PpoSettings:
        if self.train.filter_equal and self.sampling.samples == 1:
            raise ValueError(
                "train.filter_equal = true leaves out prompts whose responses have the same reward, but sampling.samples = 1; "
                "turn it off, or raise sampling.samples"
            )
        return self

    @model_validator(mode="after")
    def _the_value_model_has_a_layout(self) -> PpoSettings:
        policy, value = self.parallel, self.value.parallel
        if value is None:
            return self
        if policy.data is None and value.data is not None:
            ranks = value.model_parallel * value.data
            if ranks % policy.model_parallel:
                raise ValueError(
                    f"value.parallel: {ranks} processes, but the policy's layout takes multiples of {policy.model_parallel}; "
                    "change either"
                )
        if policy.data is not None:
            try:
                value.replicas(policy.model_parallel * policy.data)
            except UserError as error:
                raise ValueError(f"value.{error.problems[0]}") from None
        # whatever settings ask of the policy's layout, they ask of this one
        alone = self.model_dump() | {"parallel": value.model_dump(), "value": self.value.model_dump() | {"parallel": None}}
        try:
            type(self).model_validate(alone)
        except ValidationError as error:
            told = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
            raise ValueError(f"value.parallel, looked at as parallel: {told}") from None
        return self


def workload(settings: PpoSettings) -> Workload:
    """Prompts, to which servers sample responses; the old weights' log-probabilities and values are scored, and the reference's
    log-probabilities where the reward compares with it."""
    parallel = settings.value.parallel or settings.parallel
    value = ValueWork(path=settings.value.path, parallel=parallel, updates=settings.value.updates)
    scorings = 1 + settings.policy.reads_reference
    return sampled(settings, scorings, value)
