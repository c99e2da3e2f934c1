"""The table of a model's low-rank adapters, as PEFT names and cuts them; it follows from the model's own.

Of a matrix [out, in] that tensor parallelism cuts along its rows, A [rank, in] is copied and B [out, rank] cut; of one that it
cuts along its columns, A is cut and B copied. Lengths of rows (DoRA) are cut as B is. So all of an adapter lies where its matrix
does, whatever the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tulu_mega.bridge.rules import Config, Cut, Family, Rule
from tulu_mega.config.lora import LoraSettings
from tulu_mega.distributed.grid import ShardGrid

ROOT = "adapters."
"""What the names of adapters in a Megatron model begin with; what follows is the Hugging Face matrix and `A` or `B`."""
A, B = ".lora_A", ".lora_B"
MAGNITUDE = ".lora_magnitude_vector"
"""The lengths of a matrix's rows, where these are trained apart (DoRA); PEFT's name of it ends so, too."""
PEFT_ROOT = "base_model.model."
"""What PEFT's names begin with, before the matrix."""
_WEIGHT = ".weight"


def adapter_family(family: Family, lora: LoraSettings, config: Config) -> Family:
    """The adapters of a family as a family of its own: everything that moves weights moves them by it. The head of a reward
    model, which trains beside them, is one of its tensors.

    Args:
        lora: which matrices have adapters, and of which ranks.
        config: the model's config.json.
    """
    matrices = [
        (hf, dims, rule.cut, rank)
        for rule in family.rules
        for pattern, dims in rule.hf.items()
        for hf, rank in _ranks(pattern, lora, config["num_hidden_layers"])
    ]
    rules = tuple(row for matrix in matrices for row in _rows(*matrix, lora.dora))
    if family.reward:
        rules += (Rule(("output_layer.weight",), {PEFT_ROOT + family.head: _head(family)}, Cut.COPY),)
    ranks = {_extent(rank): rank for *_, rank in matrices}
    return replace(family, rules=rules, sizes=lambda config: {**family.sizes(config), **ranks}, leftovers=(), adapters=True)


def _ranks(pattern: str, lora: LoraSettings, layers: int) -> list[tuple[str, int]]:
    """Names of the matrices of a kind that have adapters, and these ranks: one pattern where all layers are alike."""
    names = [pattern.format(i=layer) for layer in range(layers)] if "{i}" in pattern else [pattern]
    found = [(name, lora.rank_of(name)) for name in names if lora.has(name)]
    alike = len(found) == len(names) and len({rank for _, rank in found}) == 1
    return [(pattern, found[0][1])] if alike else found


def _extent(rank: int) -> str:
    return f"rank {rank}"


def adapted(family: Family, config: Config) -> list[str]:
    """Names of the matrices that may have adapters."""
    return [name for name in family.hf_shapes(config) if LoraSettings().has(name)]


def adapter_name(hf_name: str) -> str:
    """What the names of a matrix's two adapter parameters in a Megatron model begin with: `A` or `B` follows."""
    return ROOT + hf_name.removesuffix(_WEIGHT)


def rows_of(family: Family, megatron_name: str, config: Config, grid: ShardGrid) -> Mapping[str, list[tuple[int, int, int]]]:
    """Where the rows of a parameter's shard come from: for each matrix in it, (its row, row of the shard, how many).

    Args:
        family: the model's, not the adapters'.
        megatron_name, config, grid: as of `Family.pieces`.
    """
    found: dict[str, list[tuple[int, int, int]]] = {}
    for piece in family.pieces(megatron_name, config, grid):
        (first, last), (at, _) = piece.hf_box[0], piece.local_box[0]
        found.setdefault(piece.hf_name, []).append((first, at, last - first))
    return found


def _head(family: Family) -> tuple[str, ...]:
    return next(rule.hf[family.head] for rule in family.rules if family.head in rule.hf)


def _rows(hf: str, dims: tuple[str, ...], cut: Cut, rank: int, dora: bool) -> tuple[Rule, ...]:
    (out, into), thin = dims, _extent(rank)
    name, peft = adapter_name(hf), PEFT_ROOT + hf.removesuffix(_WEIGHT)
    by_columns = cut is Cut.ROW
    magnitude = Rule((name + MAGNITUDE,), {peft + MAGNITUDE: (out,)}, Cut.COPY if by_columns else Cut.COLUMN)
    return (
        *([magnitude] if dora else []),
        Rule((name + A,), {f"{peft}{A}{_WEIGHT}": (thin, into)}, Cut.ROW if by_columns else Cut.COPY),
        Rule((name + B,), {f"{peft}{B}{_WEIGHT}": (out, thin)}, Cut.COPY if by_columns else Cut.COLUMN),
    )
