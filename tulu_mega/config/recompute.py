"""Which activations are not kept but computed again in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

Module = Literal["core_attn", "layernorm", "activation", "mlp"]
MODULES: tuple[str, ...] = get_args(Module)


def _names(value: Any) -> Any:
    """``"layernorm,activation"``, or a module alone, as a list."""
    if isinstance(value, str) and value not in ("none", "selective", "full"):
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


def _once_each(value: Any) -> Any:
    if isinstance(value, list):
        again = sorted({str(name) for name in value if value.count(name) > 1})
        if again or not value:
            raise ValueError(f"{', '.join(again) + ' more than once' if again else 'an empty list'}: expected some of "
                             f"{', '.join(MODULES)}, each once; or 'none'")  # fmt: skip
        if "mlp" in value and "activation" in value:
            raise ValueError("'mlp' computes the activation again too; leave 'activation' out")
    return value


Recompute = Annotated[
    Literal["none", "selective", "full"] | list[Module], BeforeValidator(_once_each), BeforeValidator(_names)
]


@dataclass(frozen=True)
class Recomputed:
    """What `model.recompute` and `model.recompute_layers` come to."""

    modules: frozenset[str] = frozenset()
    """of every layer"""
    layers: int | None = 0
    """whole layers of each chunk of the model, the first ones; None: all of them"""

    @property
    def megatron(self) -> dict[str, Any]:
        """Fields of megatron-core's TransformerConfig that say so. It knows no `activation` of a dense feed-forward."""
        if self.layers != 0:
            method = dict(recompute_method="uniform", recompute_num_layers=1)
            if self.layers is not None:
                method = dict(recompute_method="block", recompute_num_layers=self.layers)
            return dict(recompute_granularity="full") | method
        own = sorted(self.modules - {"activation"})
        return dict(recompute_granularity="selective", recompute_modules=own) if own else {}


def recomputed(recompute: str | list[str], layers: int | None) -> Recomputed:
    """The two settings together.

    Raises:
        ValueError: a number of layers is given where none is recomputed whole.
    """
    if layers is not None and recompute != "full":
        raise ValueError(f"recompute_layers = {layers} needs recompute = 'full', got {recompute!r}; leave the number out")
    if recompute == "full":
        return Recomputed(layers=layers)
    if isinstance(recompute, str):
        recompute = ["core_attn"] if recompute == "selective" else []
    return Recomputed(frozenset(recompute))
