"""Precision of the layers' matrix products."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tulu_mega.config.sections import Section

Layers = Annotated[int, Field(ge=0)]


class PrecisionSettings(Section):
    alone: ClassVar[str] = "fp8"
    fp8: Literal["off", "delayed", "tensorwise", "blockwise"] = "off"
    """FP8 for the layers' matrix products (Transformer Engine, GPUs only), scaled by what tensors held in earlier steps
    (`delayed`), by the tensor at hand (`tensorwise`), or by blocks of 128 x 128 weights and 1 x 128 activations (`blockwise`).
    Embedding, attention, norms and head stay in bf16."""
    first_bf16: Layers = 0
    """Layers at the beginning that stay in bf16 (not with `delayed`)."""
    last_bf16: Layers = 0
    """Layers at the end that stay in bf16 (not with `delayed`)."""

    fp8_param_gather: bool = False
    """Keep the layers' matrices in FP8 only, and gather them in FP8 after each update. The distributed optimizer keeps float32
    main parameters (not with `delayed`)."""

    @property
    def recipe(self) -> Literal["delayed", "tensorwise", "blockwise"] | None:
        """None when off."""
        return None if self.fp8 == "off" else self.fp8

    @property
    def megatron(self) -> dict[str, Any]:
        """Fields of megatron-core's TransformerConfig that say so."""
        if self.recipe is None:
            return {}
        fields: dict[str, Any] = dict(
            fp8="e4m3" if self.recipe == "blockwise" else "hybrid",  # hybrid: gradients in E5M2, which has the range
            fp8_recipe=self.recipe,
        )
        if self.fp8_param_gather:
            fields |= dict(fp8_param=True)
        if self.recipe == "delayed":
            fields |= dict(fp8_amax_history_len=1024, fp8_amax_compute_algo="max")  # Transformer Engine's own defaults
        if self.first_bf16 or self.last_bf16:
            fields |= dict(
                first_last_layers_bf16=True,
                num_layers_at_start_in_bf16=self.first_bf16,
                num_layers_at_end_in_bf16=self.last_bf16,
            )
        return fields

    @property
    def environment(self) -> dict[str, str]:
        """What Transformer Engine reads when it is imported: block scales as float32 numbers, as vLLM has them, in the place of
        powers of two."""
        return {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"} if self.recipe == "blockwise" else {}

    @model_validator(mode="after")
    def _consistent(self) -> PrecisionSettings:
        kept = [f"{name} = {getattr(self, name)}" for name in ("first_bf16", "last_bf16") if getattr(self, name)]
        if kept and self.recipe in (None, "delayed"):
            why = "is off: all layers are in bf16" if self.recipe is None else "= 'delayed' puts all layers in FP8"
            raise ValueError(f"{', '.join(kept)}, but precision.fp8 {why}; leave it out, or choose 'tensorwise' or 'blockwise'")
        if self.fp8_param_gather and self.recipe in (None, "delayed"):
            # loaded weights would be cast by a scale that no step has found yet
            raise ValueError(
                f"precision.fp8_param_gather needs precision.fp8 = 'tensorwise' or 'blockwise', got {self.fp8!r}; choose one, or "
                "turn it off"
            )
        return self
