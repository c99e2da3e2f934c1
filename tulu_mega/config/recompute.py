"""Which activations are not kept but computed again in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from tulu_mega.errors import nearest

MODULES = ("core_attn", "layernorm", "activation", "mlp")
WHOLE = ("none", "selective", "full")


def _known(value: Any) -> Any:
    """The value, a list of modules where it is a text that names them: ``"layernorm,activation"``.

    Raises:
        ValueError: for anything else.
    """
    if value in WHOLE:
        return value
    names = value
    if isinstance(value, str):
        names = [name.strip() for name in value.split(",") if name.strip()]
    expected = f"expected {', '.join(map(repr, WHOLE))}, or a list of some of {', '.join(MODULES)}"
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{value!r}: {expected}")
    if unknown := [name for name in names if name not in MODULES]:
        raise ValueError(f"{', '.join(unknown)}{nearest(unknown[0], [*MODULES, *WHOLE])}; {expected}")
    if again := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(again)} more than once: {expected}, each once")
    if not names:
        raise ValueError(f"an empty list: {expected}")
    if "mlp" in names and "activation" in names:
        raise ValueError("'mlp' computes the activation again too; leave 'activation' out")
    return names


Recompute = Annotated[str | list[str], BeforeValidator(_known)]


@dataclass(frozen=True)
class Recomputed:
    """What `model.recompute` and `model.recompute_layers` come to."""

    modules: frozenset[str] = frozenset()
    """Modules that every layer computes again."""
    layers: int | None = 0
    """Number of whole layers, the first of each chunk, that are computed again. None: all of them."""

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
