"""Low-rank adapters that train in the place of the weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tulu_mega.config.effects import Effect
from tulu_mega.config.sections import PositiveInt, Section

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Matrices of a decoder's layer, by the last part of their names in Hugging Face's models."""
ALL = "all-linear"
NF4_BLOCK = 64
"""Weights that share a scale."""
NF4_GROUP = 256
"""Scales that share one."""
_OF_THE_BASE = ("adapter", "base_precision", "double_quantization")
"""What a directory of adapters does not say."""
_WEIGHT = ".weight"


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
    dora: bool = False
    """Train the lengths of the rows of W + scale B A apart (arXiv 2402.09353), as PEFT's `use_dora` does."""
    targets: str | list[str] = ALL
    """Matrices that have adapters: all of a layer's, or some of `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`,
    `down_proj`, of one layer as `layers.3.mlp.up_proj`; or a regular expression for whole names such as
    `model.layers.3.mlp.up_proj`, as PEFT reads them."""
    rank_pattern: dict[str, PositiveInt] = {}
    """Other ranks: regular expressions for the ends of names, such as `k_proj` or `layers\\.[0-3]\\..*`, the first that fits."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Other alphas, found alike."""

    base_precision: Literal["model", "nf4"] = "model"
    """What the layers' frozen matrices are held as: of `model.dtype`, or four bits a weight in blocks of 64 (QLoRA, arXiv
    2305.14314), made whole of that type a layer at a time."""
    double_quantization: bool = True
    """Quantize the blocks' scales as well: 4.13 bits a weight instead of 4.5."""

    @field_validator("targets")
    @classmethod
    def _known(cls, targets: str | list[str]) -> str | list[str]:
        if isinstance(targets, str):
            if targets != ALL:
                _expression(targets)
                if targets in LINEARS:
                    raise ValueError(f"{targets!r} is an expression for whole names; write [{targets!r}] for these matrices")
            return targets
        unknown = [each for each in targets if each.rpartition(".")[2] not in LINEARS]
        if unknown or not targets:
            near = [found for each in unknown for found in difflib.get_close_matches(each.rpartition(".")[2], LINEARS, 1)]
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"{', '.join(unknown) or 'nothing'}: expected '{ALL}' or some of {', '.join(LINEARS)}{hint}")
        if twice := sorted({each for each in targets if targets.count(each) > 1}):
            raise ValueError(f"{', '.join(twice)}: named more than once")
        return targets

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _expressions(cls, patterns: dict[str, float]) -> dict[str, float]:
        for each in patterns:
            _expression(each)
        return patterns

    @model_validator(mode="after")
    def _the_adapter_says_it(self) -> LoraSettings:
        if self.adapter and (given := sorted(self.model_fields_set - set(_OF_THE_BASE))):
            raise ValueError(f"lora.adapter = {self.adapter!r} decides about {', '.join(given)}, too; leave these out")
        return self

    @property
    def quantized(self) -> bool:
        """Whether frozen matrices are quantized."""
        return self.base_precision != "model"

    @property
    def bits(self) -> float:
        """Of a quantized weight: its own, its share of a scale, and of a scale of scales."""
        scale = 8 + 32 / NF4_GROUP if self.double_quantization else 32
        return 4 + scale / NF4_BLOCK

    @property
    def of_the_base(self) -> dict[str, Any]:
        """What a directory of adapters does not say."""
        return {name: value for name, value in self if name in _OF_THE_BASE}

    def has(self, matrix: str) -> bool:
        """Whether a matrix has an adapter.

        Args:
            matrix: its tensor's name in Hugging Face's models, or its module's.
        """
        name = matrix.removesuffix(_WEIGHT)
        if name.rpartition(".")[2] not in LINEARS:
            return False
        if isinstance(self.targets, str):
            return self.targets == ALL or re.fullmatch(self.targets, name) is not None
        return any(f".{name}".endswith(f".{each}") for each in self.targets)

    def unmatched(self, matrices: Collection[str]) -> list[str]:
        """Targets and patterns that fit no matrix of a model, as sentences.

        Args:
            matrices: names of all that may have adapters.
        """
        names = [name.removesuffix(_WEIGHT) for name in matrices]
        found = []
        for each in [self.targets] if isinstance(self.targets, str) else self.targets:
            if not any(map(LoraSettings(targets=each if isinstance(self.targets, str) else [each]).has, names)):
                near = difflib.get_close_matches(each, {*names, *(name.partition(".")[2] for name in names)}, 1)
                hint = f"; the nearest is {near[0]}" if near else f"; they have names such as {names[0]}" if names else ""
                found.append(f"targets: {each!r} fits no matrix of the model{hint}")
        for field, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for each in patterns:
                if not any(_fits(each, name) for name in names if self.has(name)):
                    found.append(f"{field}: {each!r} fits no matrix that has an adapter")
        return found

    def rank_of(self, matrix: str) -> int:
        """The rank of a matrix's adapter. Arguments of :meth:`has`."""
        return int(_first_that_fits(self.rank_pattern, matrix, self.rank))

    def alpha_of(self, matrix: str) -> float:
        """The alpha of a matrix's adapter. Arguments of :meth:`has`."""
        return _first_that_fits(self.alpha_pattern, matrix, self.alpha)

    def scale_of(self, matrix: str) -> float:
        """Factor of a matrix's product. Arguments of :meth:`has`."""
        rank = self.rank_of(matrix)
        return self.alpha_of(matrix) / (rank**0.5 if self.rslora else rank)


def _first_that_fits(patterns: Mapping[str, float], matrix: str, otherwise: float) -> float:
    """As PEFT reads `rank_pattern` and `alpha_pattern`."""
    return next((value for each, value in patterns.items() if _fits(each, matrix.removesuffix(_WEIGHT))), otherwise)


def _fits(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _expression(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None
