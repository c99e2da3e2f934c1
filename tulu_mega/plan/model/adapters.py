"""What low-rank adapters add to a plan: their elements on a rank, what passes through them and what of it is kept.

r rank   T tokens of a pack   i, o columns and rows of the matrix, as this rank has them   s, t as for `kept`
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tulu_mega.bridge.adapters import ROOT, adapter_family
from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.rules import Cut
from tulu_mega.config.lora import LoraSettings
from tulu_mega.distributed.grid import ShardGrid
from tulu_mega.plan.model.parameters import Shard

_NUMBER = re.compile(r"\.(\d+)\.")


def adapters_by_layer(config: Mapping[str, Any], lora: LoraSettings, tensor: int) -> list[list[Shard]]:
    """Every parameter of each layer's adapters as a tensor rank holds it. All tensor ranks hold as much.

    Args:
        config: Hugging Face's config.json.
        lora: which adapters; of a directory, what it says.
        tensor: ranks.

    Raises:
        UserError: for a size that the tensor ranks do not divide.
    """
    family = adapter_family(family_for(config), lora, config)
    made: list[list[Shard]] = [[] for _ in range(config["num_hidden_layers"])]
    for rule in (rule for rule in family.rules if rule.megatron[0].startswith(ROOT)):
        (pattern,) = rule.megatron
        shape = family.local_shape(pattern.format(i=0), config, ShardGrid(tensor=tensor))
        for layer in range(len(made)) if "{i}" in pattern else (int(_NUMBER.search(pattern)[1]),):
            made[layer].append(Shard(pattern.format(i=layer), shape, "layers", rule.cut is Cut.COPY))
    return made


def stage_adapters(by_layer: Sequence[list[Shard]], split: Sequence[int], stage: int) -> list[Shard]:
    """Those of a stage.

    Args:
        by_layer: of :func:`adapters_by_layer`.
        split: layers of every stage.
        stage: from 0 to PP x VPP - 1.
    """
    return [shard for layer in by_layer[sum(split[:stage]) : sum(split[: stage + 1])] for shard in layer]


@dataclass(frozen=True)
class AdapterWork:
    """What the adapters of a layer of mean kind do for a token of a pack, forward and backward, on this rank."""

    flops: float
    """forward; backward twice as many"""
    forward: float
    """bytes that pass through memory"""
    backward: float
    kept: float
    """bytes of narrow products, which B's gradients need; what A's need the layer keeps anyway"""
    launches: float
    """kernels forward; backward twice as many"""
    lengths: float
    """bytes that pass through memory for the lengths of weights' rows, once a pass over a micro-batch"""
    deltas: float
    """bytes of what the adapters of the layer's tallest matrix add, made apart and joined"""


NONE = AdapterWork(0, 0, 0, 0, 0, 0, 0)


def adapter_work(config: Mapping[str, Any], lora: LoraSettings | None, tensor: int, sequence: bool, itemsize: int) -> AdapterWork:
    """What the adapters of a layer of mean kind do.

    Forward A reads its input (once for matrices that have it in common); B's product is written, joined to its neighbours' where
    the layer has several (a read and a write) and added (two reads and a write). Backward the gradient is read for B and for the
    narrow product, the input for A; what comes of it for the input is written and added. These products are too narrow for the
    GPU to be busy with them: their time is that of the bytes. Where lengths of rows are trained, what is scaled is kept, read and
    written once more each way, and each pass reads the weight, adds the product and squares in float32.

    Kernels: for each of megatron-core's matrices one product with A, joining and adding, for each adapter a scaling and a product
    with B, and a message between tensor ranks.

    Args:
        config, lora: as for :func:`adapters_by_layer`; None, nothing is done.
        tensor, sequence: ranks, and whether they share the tokens.
        itemsize: bytes of an activation.
    """
    if lora is None:
        return NONE
    family, t, item = family_for(config), tensor, itemsize
    own = t if sequence else 1
    layers, sizes = config["num_hidden_layers"], family.sizes(config)
    flops = forward = backward = kept = launches = lengths = 0.0
    deltas: dict[str, float] = {}
    for rule, layer in ((rule, layer) for rule in family.rules for layer in range(layers) if "{i}" in rule.megatron[0]):
        names = {pattern.format(i=layer): dims for pattern, dims in rule.hf.items()}
        found = {name: dims for name, dims in names.items() if lora.has(name)}
        if not found:
            continue
        by_columns = rule.cut is Cut.ROW
        wide, tall = (t, own) if by_columns else (own, t)  # what shares out columns and rows of a token's product
        into = sizes[next(iter(found.values()))[1]] / wide
        for name, (out, dims_into) in found.items():
            rank, rows = lora.rank_of(name), sizes[out] / tall
            flops += 2 * rank * (into + rows)
            forward += item * (4 if by_columns else 6) * rows
            backward += item * 3 * rows
            kept += item * rank / (own if by_columns else 1)
            if lora.dora:
                kept += item * rows
                forward += item * 2 * rows
                backward += item * 4 * rows
                lengths += (item + 5 * 4) * sizes[out] * sizes[dims_into] / t
                launches += 6
        forward += item * into
        backward += item * 5 * into
        launches += 2 * len(found) + 3 + (t > 1)
        if not by_columns:
            made = item * 2 * sum(sizes[out] / tall for out, _into in names.values())
            deltas[rule.megatron[0]] = made
    sums = (each / layers for each in (flops, forward, backward, kept, launches, lengths))
    return AdapterWork(*sums, deltas=max(deltas.values(), default=0.0))
