"""The table that says which box of a Hugging Face tensor is which box of a Megatron parameter's shard. It is read both ways.

A family is a handful of `Rule`s, the sizes that their shapes are made of, and what its layers need beside a Llama's. From the
rules everything that moves weights (loading, export, sending to a rollout engine) takes pairs of boxes, `Piece`s, and needs to
know nothing about attention groups or gates; from the needs the model is built.
In patterns `{i}` stands for the layer's number in the whole model, from 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from tulu_mega.bridge.box import Box
from tulu_mega.distributed.grid import ShardGrid
from tulu_mega.errors import UserError

Shape = tuple[int, ...]
Config = Mapping[str, Any]
"""The content of a Hugging Face config.json."""
Sizes = Mapping[str, int]
"""Extents by the names that rules use; ``groups``, the number of key-value groups, is always among them."""

_NUMBER = re.compile(r"\.(\d+)(?=\.)")


class Cut(Enum):
    """How tensor parallelism cuts a parameter."""

    COPY = "copy"
    """every rank holds all of it"""
    COLUMN = "column"
    """along axis 0"""
    ROW = "row"
    """along axis 1"""
    QKV = "qkv"
    """(q, k, v) interleaved per key-value group: the group's queries, its key, its value; then along axis 0"""
    GATED = "gated"
    """(gate, up): each along axis 0, a rank holds its share of the first above its share of the second"""
    VOCAB = "vocab"
    """along axis 0 after padding with rows that Hugging Face does not have"""


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    ``megatron`` lists its name under every layer specification, ``hf`` the tensors in the order the cut names them, each with the
    names of its sizes: ``{"lm_head.weight": ("vocab", "hidden")}``. A rule about one layer alone has its
    number in place of `{i}`.
    """

    megatron: tuple[str, ...]
    hf: Mapping[str, tuple[str, ...]]
    cut: Cut


@dataclass(frozen=True)
class LayerNeeds:
    """What a family's layers have that a Llama's do not."""

    qkv_bias: bool = False
    """the query, key and value projections add a bias"""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """RMS norm of queries and keys before they are rotated: each head by itself, or all heads of the projection together"""
    norms: Literal["before", "after"] = "before"
    """whether attention and MLP have their norm on the way in or, on the residual branch, on the way out"""
    window: int | None = None
    """tokens that a layer with a sliding window attends to, the token itself among them"""
    windowed: tuple[bool, ...] = ()
    """by layer: has the window; empty without windows"""
    ropes: tuple[str, ...] = ()
    """by layer: its entry in config.json's ``rope_parameters``; empty where all layers share one"""


@dataclass(frozen=True)
class Piece:
    """The box ``hf_box`` of the tensor ``hf_name`` is the box ``local_box`` of this rank's shard; both of one shape.

    Worked example: 4 heads of size 2 in 2 groups, hidden 8. Of a ``linear_qkv.weight`` under TP 2, rank 1 holds group 1,
    that is rows 4..7 of q, 2..3 of k and 2..3 of v::

        Piece("...q_proj.weight", ((4, 8), (0, 8)), ((0, 4), (0, 8)))
        Piece("...k_proj.weight", ((2, 4), (0, 8)), ((4, 6), (0, 8)))
        Piece("...v_proj.weight", ((2, 4), (0, 8)), ((6, 8), (0, 8)))
    """

    hf_name: str
    hf_box: Box
    local_box: Box
    duplicate: bool = False
    """the same weights belong to another parameter too (tied embeddings): load both, export the other"""


@dataclass(frozen=True)
class Family:
    """A model family: its table, read by the methods in both directions."""

    architecture: str
    """name in config.json's ``architectures``"""
    rules: tuple[Rule, ...]
    sizes: Callable[[Config], Sizes]
    """the sizes that the rules name; raises UserError for a config it cannot read"""
    needs: Callable[[Config], LayerNeeds] = lambda config: LayerNeeds()
    """what the layers need; raises UserError for a config it cannot read"""
    model_type: str = ""
    """name in config.json's ``model_type``; empty where it is the architecture's in lower case, up to ``For``"""
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    leftovers: tuple[str, ...] = ("*.rotary_emb.inv_freq", "*.rotary_emb.cos_cached", "*.rotary_emb.sin_cached")
    """shell patterns of tensors that a checkpoint may hold and nobody needs: by default buffers of rotary embeddings, which older
    versions of transformers stored; they follow from config.json, which alone is read, as transformers and vLLM do"""
    reward: bool = False
    """its head gives a score instead of logits, and so is never the embedding"""
    adapters: bool = False
    """its tensors are low-rank adapters beside a model's weights, not these"""

    def is_tied(self, config: Config) -> bool:
        """Whether the head shares the embedding's weights."""
        return bool(config.get("tie_word_embeddings", False)) and not self.reward

    def hf_shapes(self, config: Config) -> dict[str, Shape]:
        """Name -> shape of every tensor that a checkpoint of this config must hold.

        Raises:
            UserError: for a config that the family cannot read.
        """
        sizes = self.sizes(config)
        self.needs(config)  # a model whose layers cannot be built is refused here, before anything is launched
        return {
            pattern.format(i=i): tuple(sizes[each] for each in dims)
            for rule in self.rules
            for i in range(config["num_hidden_layers"] if "{i}" in rule.megatron[0] else 1)
            for pattern, dims in rule.hf.items()
            if not (pattern == self.head and self.is_tied(config))
        }

    def ignorable(self, config: Config) -> tuple[str, ...]:
        """Shell patterns of tensors that may be in a checkpoint beside `hf_shapes`."""
        return (*self.leftovers, self.head) if self.is_tied(config) else self.leftovers

    def tied(self, config: Config) -> tuple[str, str] | None:
        """The tensors that are one where the head is the embedding, though a checkpoint may hold both."""
        return (self.embedding, self.head) if self.is_tied(config) else None

    def pieces(self, megatron_name: str, config: Config, grid: ShardGrid) -> list[Piece]:
        """Return the boxes that make up one rank's shard of a parameter, in the order of the shard.

        The boxes cover the shard exactly once, except rows of vocabulary padding. A shard of padding alone has none.

        Args:
            megatron_name: parameter name with the layer's number in the whole model, of either layer specification.
            config: the model's config.json.
            grid: the rank's place.

        Raises:
            UserError: for a parameter the table does not have, or a size that the group does not divide.
        """
        return self._plan(megatron_name, config, grid.tensor_rank, grid.tensor)[1]

    def pieces_by_rank(self, megatron_name: str, config: Config, grid: ShardGrid) -> list[list[Piece]]:
        """Return the pieces of a parameter that each rank of a tensor parallel group gives.

        Only the first rank gives a replicated parameter. Arguments and errors are those of `pieces`.
        """
        per_rank = [self.pieces(megatron_name, config, each) for each in grid.tensor_peers()]
        return per_rank[:1] if per_rank == [per_rank[0]] * len(per_rank) else per_rank

    def local_shape(self, megatron_name: str, config: Config, grid: ShardGrid) -> Shape:
        """Shape of the shard of a parameter, the same on every rank that holds it, padding included. Raises as `pieces`."""
        return self._plan(megatron_name, config, 0, grid.tensor)[0]

    def _plan(self, megatron_name: str, config: Config, tp_rank: int, tp_size: int) -> tuple[Shape, list[Piece]]:
        sizes = self.sizes(config)
        rule, layer = self.rule(megatron_name, config)
        duplicate = self.head in rule.hf and self.is_tied(config)
        patterns = [self.embedding] if duplicate else list(rule.hf)
        full = [tuple(sizes[each] for each in dims) for dims in rule.hf.values()]
        axis = 1 if rule.cut is Cut.ROW else 0
        size, runs = _runs(rule.cut, [shape[axis] for shape in full], sizes["groups"], tp_rank, tp_size, megatron_name)
        made, at = [], 0
        for which, start, stop in runs:
            across = Box.whole(full[which])
            hf_box = Box((*across[:axis], (start, stop), *across[axis + 1 :]))
            local_box = Box((*across[:axis], (at, at + stop - start), *across[axis + 1 :]))
            made.append(Piece(patterns[which].format(i=layer), hf_box, local_box, duplicate))
            at += stop - start
        return full[0][:axis] + (size,) + full[0][axis + 1 :], made

    def rule(self, megatron_name: str, config: Config) -> tuple[Rule, int]:
        """The row about a parameter, and its layer (0 outside of layers). Arguments and errors of `pieces`."""
        number = _NUMBER.search(megatron_name)
        layer = int(number[1]) if number else 0
        pattern = _NUMBER.sub(".{i}", megatron_name, count=1)
        for rule in self.rules:
            if pattern in rule.megatron or megatron_name in rule.megatron:
                if number and layer >= config["num_hidden_layers"]:
                    raise UserError(f"{megatron_name}: config.json has num_hidden_layers = {config['num_hidden_layers']}")
                return rule, layer
        raise UserError(f"{megatron_name}: {self.architecture} has no such parameter; drop the option that adds it")


def is_weight(megatron_name: str) -> bool:
    """Return whether a name is a weight's. Transformer Engine's `_extra_state` holds no weights."""
    return not megatron_name.endswith("_extra_state")


def padded_vocab(vocab: int, tp_size: int) -> int:
    """Return the rows of the embedding in Megatron: the next multiple of 8 x TP."""
    multiple = 8 * tp_size
    return -(-vocab // multiple) * multiple


Run = tuple[int, int, int]  # (which tensor, start, stop) along the cut axis


def _runs(cut: Cut, sizes: list[int], groups: int, tp_rank: int, tp_size: int, name: str) -> tuple[int, list[Run]]:
    """Extent of the shard along the cut axis, and the runs of rows whose concatenation it is."""
    if cut is Cut.COPY:
        return sizes[0], [(0, 0, sizes[0])]
    if cut is Cut.GATED:
        shares = [_share(size, tp_rank, tp_size, name) for size in sizes]
        return sum(stop - start for start, stop in shares), [(which, *share) for which, share in enumerate(shares)]
    total = padded_vocab(sizes[0], tp_size) if cut is Cut.VOCAB else sum(sizes)
    start, stop = _share(total, tp_rank, tp_size, name)
    whole = _interleaved(sizes, groups) if cut is Cut.QKV else [(0, 0, sizes[0])]
    return stop - start, _between(whole, start, stop)


def _share(total: int, tp_rank: int, tp_size: int, name: str) -> tuple[int, int]:
    if total % tp_size:
        raise UserError(f"{name}: {total} rows or columns do not divide by a tensor parallel size of {tp_size}; choose a divisor")
    share = total // tp_size
    return tp_rank * share, (tp_rank + 1) * share


def _interleaved(sizes: list[int], groups: int) -> list[Run]:
    heads = [size // groups for size in sizes]
    return [(which, g * rows, (g + 1) * rows) for g in range(groups) for which, rows in enumerate(heads)]


def _between(runs: list[Run], start: int, stop: int) -> list[Run]:
    """Return the runs between two rows of a concatenation of runs."""
    part, at = [], 0
    for which, first, last in runs:
        low, high = max(first, first + start - at), min(last, first + stop - at)
        if low < high:
            part.append((which, low, high))
        at += last - first
    return part
