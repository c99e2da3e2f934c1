"""Which loss of pairs, and its settings: names, defaults and what they mean stand in `objectives/preference/`, a file each."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tulu_mega.config.choices import choices
from tulu_mega.config.sections import Section

PREFERENCE_LOSSES = choices("objectives.preference", "Loss")
"""By name, the classes of the losses of pairs; their fields are the settings that they take, with their defaults."""
_USUAL_LOSS = "dpo_norm"


def _defaults(setting: str) -> dict[str, Any]:
    """A setting's default in each loss that takes it, by the loss's name, the usual loss first."""
    every = {name: {field.name: field.default for field in fields(loss)} for name, loss in PREFERENCE_LOSSES.items()}
    return {name: every[name][setting] for name in sorted(every, key=lambda name: name != _USUAL_LOSS) if setting in every[name]}


def _default(setting: str) -> Any:
    return next(iter(_defaults(setting).values()))


def _takers(setting: str) -> str:
    return ", ".join(f"`{name}`" for name in sorted(_defaults(setting)))


_SUMMARIES = "; ".join(f"`{name}`: {loss.__doc__.splitlines()[0].removesuffix('.')}" for name, loss in PREFERENCE_LOSSES.items())
_BETAS = ", ".join(f"{beta:g} for `{name}`" for name, beta in _defaults("beta").items())
_SMOOTHED, _WITH_GAMMA = _takers("label_smoothing"), _takers("gamma_beta_ratio")


class PreferenceSettings(Section):
    loss: Annotated[Literal[tuple(PREFERENCE_LOSSES)], Field(description=f"{_SUMMARIES}.")] = _USUAL_LOSS
    beta: Annotated[
        float,
        Field(gt=0, description=f"The formula's beta, which scales log-probabilities or weighs their term; unset, {_BETAS}."),
    ] = _default("beta")
    label_smoothing: Annotated[
        float, Field(ge=0, lt=0.5, description=f"Share of the labels taken to be the wrong way round ({_SMOOTHED} only).")
    ] = _default("label_smoothing")
    gamma_beta_ratio: Annotated[
        float, Field(ge=0, description=f"{_WITH_GAMMA}: by how much the mean log-probabilities are to differ.")
    ] = _default("gamma_beta_ratio")
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a further term: the chosen response's mean negative log-probability per token."""

    @property
    def reads_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return PREFERENCE_LOSSES[self.loss].reads_reference

    def made_loss(self) -> Any:
        """The loss with these settings, a `tulu_mega.objectives.pairs.PreferenceLoss`."""
        kind = PREFERENCE_LOSSES[self.loss]
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_loss(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(name := value.get("loss", _USUAL_LOSS), str) and name in PREFERENCE_LOSSES:
            usual = {field.name: field.default for field in fields(PREFERENCE_LOSSES[name])}
            return usual | {setting: given for setting, given in value.items() if given is not None}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PreferenceSettings:
        if self.label_smoothing and self.loss not in _defaults("label_smoothing"):
            told = f"label_smoothing = {self.label_smoothing}: {self.loss} has none; leave it out or choose another loss"
            raise ValueError(told)
        return self
