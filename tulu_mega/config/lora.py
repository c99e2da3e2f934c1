"""Low-rank adapters that train in the place of the weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tulu_mega.config.effects import Effect
from tulu_mega.config.sections import PositiveInt, Section

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Matrices of a decoder's layer, by the last part of their names in Hugging Face's models."""


class LoraSettings(Section):
    """LoRA (Hu et al., arXiv 2106.09685): next to a frozen matrix W the product of two thin ones, W x + scale B A x."""

    adapter: Annotated[str | None, Effect.CONTENT] = None
    """Directory of adapters in PEFT's format to begin with, whose rank, scale and targets hold then; new ones when unset."""
    rank: PositiveInt = 16
    """Rows of A and columns of B."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The product is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Matrices that have adapters: all of a layer's, or some of `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`,
    `down_proj`."""

    @field_validator("targets")
    @classmethod
    def _known(cls, targets: str | list[str]) -> str | list[str]:
        if isinstance(targets, str):
            return targets
        unknown = [each for each in targets if each not in LINEARS]
        if unknown or not targets:
            raise ValueError(f"{', '.join(unknown) or 'nothing'}: expected 'all-linear' or some of {', '.join(LINEARS)}")
        if twice := sorted({each for each in targets if targets.count(each) > 1}):
            raise ValueError(f"{', '.join(twice)}: named more than once")
        return targets

    @model_validator(mode="after")
    def _the_adapter_says_it(self) -> LoraSettings:
        if self.adapter and (given := sorted(self.model_fields_set - {"adapter"})):
            raise ValueError(f"lora.adapter = {self.adapter!r} decides about {', '.join(given)}, too; leave these out")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The targets, in the order of a layer's matrices."""
        return LINEARS if self.targets == "all-linear" else tuple(each for each in LINEARS if each in self.targets)

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
