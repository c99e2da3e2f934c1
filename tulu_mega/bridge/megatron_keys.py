"""Names of a family's parameters in Megatron's distributed checkpoint, and their places in its tensors.

The checkpoint does not depend on a layout. Its tensors have the shapes of a single tensor parallel rank, and tensors of layers
are stacked under one name along a leading axis. Each layout reads its own boxes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from tulu_mega.bridge.box import Box
from tulu_mega.bridge.rules import Config, Family, Shape
from tulu_mega.distributed.grid import ShardGrid


@dataclass(frozen=True)
class StoredParameter:
    """A parameter's place."""

    name: str
    """in the whole model, ``decoder.layers.3.mlp.linear_fc2.weight``"""
    key: str
    """name of the checkpoint's tensor, ``decoder.layers.mlp.linear_fc2.weight``"""
    layer: int | None
    """index along the leading axis; None without one"""
    layers: int
    """extent of that axis"""
    shape: Shape
    """shape of the parameter on a single rank, padding of the vocabulary included"""

    @property
    def global_shape(self) -> Shape:
        """Shape of the checkpoint's tensor."""
        return self.shape if self.layer is None else (self.layers, *self.shape)

    def box(self, start: int, stop: int) -> Box:
        """The box of the checkpoint's tensor that rows ``start..stop`` of the parameter are."""
        rows = ((start, stop), *((0, extent) for extent in self.shape[1:]))
        return Box(rows if self.layer is None else ((self.layer, self.layer + 1), *rows))


@dataclass(frozen=True)
class Slab:
    """Rows of a parameter that are stored together."""

    parameter: StoredParameter
    start: int
    stop: int

    @property
    def name(self) -> str:
        """For manifests and messages: ``decoder.layers.3.mlp.linear_fc2.weight[0:4096]``."""
        return f"{self.parameter.name}[{self.start}:{self.stop}]"

    @property
    def shape(self) -> Shape:
        """Without the axis of the layers."""
        return (self.stop - self.start, *self.parameter.shape[1:])

    @property
    def box(self) -> Box:
        """The slab in the checkpoint's tensor."""
        return self.parameter.box(self.start, self.stop)


def stored_parameters(family: Family, config: Config) -> list[StoredParameter]:
    """Return every parameter in the order embedding, layers, final norm, head. A tied head is the embedding.

    Raises:
        UserError: for a config that the family cannot read.
    """
    layers = config["num_hidden_layers"]
    made = []
    for rule in family.rules:
        if tuple(rule.hf) == (family.head,) and family.is_tied(config):
            continue
        pattern = rule.megatron[-1]  # norms are called as Transformer Engine's layers have them, whatever the layers are
        for layer in range(layers) if "{i}" in pattern else (None,):
            name = pattern if layer is None else pattern.format(i=layer)
            shape = family.local_shape(name, config, ShardGrid())
            made.append(StoredParameter(name, pattern.replace(".{i}", ""), layer, layers, shape))
    first = [each for each in made if each.key == "embedding.word_embeddings.weight"]
    stacked = sorted((each for each in made if each.layer is not None), key=lambda each: each.layer)
    return first + stacked + [each for each in made if each.layer is None and each not in first]


def slabs(parameters: list[StoredParameter], item_bytes: int, max_bytes: int) -> Iterator[Slab]:
    """Parameters cut along their rows into parts of at most ``max_bytes`` (one row where a row is more)."""
    for parameter in parameters:
        rows = max(1, max_bytes // max(1, prod(parameter.shape[1:]) * item_bytes))
        for start in range(0, parameter.shape[0], rows):
            yield Slab(parameter, start, min(start + rows, parameter.shape[0]))
