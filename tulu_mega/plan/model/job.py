"""A training step as the planner sees it: a model, a layout, a GPU and what is in the micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.rules import LayerNeeds
from tulu_mega.config import ParallelSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.config.recompute import Recomputed
from tulu_mega.layout.flops import head_columns
from tulu_mega.layout.hardware import Gpu
from tulu_mega.layout.stages import stage_layers
from tulu_mega.plan.model.adapters import AdapterWork, adapter_work, adapters_by_layer, stage_adapters
from tulu_mega.plan.model.kernels import FUSED, Kernels
from tulu_mega.plan.model.parameters import ITEMSIZE, Parameters, Shard, rank_parameters

NOTHING = Recomputed()


@dataclass(frozen=True)
class Pack:
    """A packed micro-batch."""

    tokens: int
    """positions, padding among them"""
    lengths: tuple[int, ...]
    """tokens of its sequences, each of which attends within itself"""
    labelled: int
    """tokens whose log-probability is asked for"""


@dataclass(frozen=True)
class Job:
    """One optimizer step. What the trainer of this project does is the default; the rest is for runs of others.

    Args:
        config: Hugging Face's config.json.
        parallel: the layout; `data` is read from `packs`.
        gpu: of the trainer's ranks.
        packs: micro-batches of each data-parallel replica.
        dtype: of parameters and activations.
        recompute: what is computed again backward.
        kernels: that the layers run with.
        fp8: the layers' matrix products are FP8, the head's and attention are not.
        fp8_weights: the parameters themselves are.
        grad_bytes: bytes of an accumulated gradient.
        moment_bytes: bytes of the optimizer's two moments, the mean.
        host_share: share of the optimizer's state that is in main memory, and updated there.
        grad_copies: a rank's share of bf16 gradients is copied to float32 for the update.
        fsdp: weights and gradients are sharded over the replicas too, and gathered layer by layer.
        full_logits: the head makes all logits of a micro-batch at once and keeps them.
        entropy: whether the objective asks for entropies.
        split: layers of every virtual stage, where they are not those of `stages`.
        lora: adapters that train beside frozen weights; of a directory, what it says.
    """

    config: Mapping[str, Any]
    parallel: ParallelSettings
    gpu: Gpu
    packs: tuple[tuple[Pack, ...], ...]
    dtype: Literal["bf16", "fp32"] = "bf16"
    recompute: Recomputed = NOTHING
    kernels: Kernels = FUSED
    fp8: bool = False
    fp8_weights: bool = False
    grad_bytes: int = 4
    moment_bytes: float = 4
    host_share: float = 0.0
    grad_copies: bool = True
    fsdp: bool = False
    full_logits: bool = False
    entropy: bool = False
    split: tuple[int, ...] | None = None
    lora: LoraSettings | None = None

    @property
    def data(self) -> int:
        """Data-parallel replicas."""
        return len(self.packs)

    @property
    def world(self) -> int:
        """Ranks of the trainer."""
        return self.parallel.model_parallel * self.data

    @property
    def shards(self) -> int:
        """Ranks that share a distributed optimizer's state: DP x CP."""
        return self.data * self.parallel.context

    @property
    def sequence(self) -> bool:
        """Whether tensor ranks share the tokens between the layers' products."""
        return self.parallel.sequence and self.parallel.tensor > 1

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return ITEMSIZE[self.dtype]

    @cached_property
    def whole(self) -> tuple[int, ...]:
        """Layers of every virtual stage that are computed again whole."""
        most = self.recompute.layers
        return tuple(layers if most is None else min(layers, most) for layers in self.layers)

    @property
    def state_bytes(self) -> float:
        """Bytes of a parameter's optimizer state: a float32 main one, where the parameter is not, and two moments."""
        return 4 * (self.dtype == "bf16") + 2 * self.moment_bytes

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Of every virtual stage."""
        return self.split or stage_layers(self.config, self.parallel)

    @cached_property
    def held(self) -> tuple[Parameters, ...]:
        """Parameters of every pipeline rank."""
        ranks = range(self.parallel.pipeline)
        return tuple(rank_parameters(self.config, self.parallel, rank, self.layers) for rank in ranks)

    @cached_property
    def adapters(self) -> tuple[int, ...]:
        """Elements of adapters on every pipeline rank, beside `held`."""
        ranks, by_layer = self.parallel.pipeline, self.adapters_by_layer
        stages = [sum(shard.count for shard in stage_adapters(by_layer, self.layers, at)) for at in range(len(self.layers))]
        return tuple(sum(stages[rank::ranks]) for rank in range(ranks))

    @cached_property
    def adapters_by_layer(self) -> list[list[Shard]]:
        """The adapters' parameters on a tensor rank, by layer of the whole model."""
        return adapters_by_layer(self.config, self.lora, self.parallel.tensor) if self.lora else []

    @property
    def blocks(self) -> float:
        """Bytes of a quantized weight of the layers; 0 where none is."""
        return self.lora.bits / 8 if self.lora and self.lora.quantized else 0.0

    @property
    def made_whole(self) -> float:
        """Bytes of the largest weight that is made whole of blocks, one at a time."""
        return self.itemsize * 2 * self.size.ffn * self.size.hidden / self.parallel.tensor if self.blocks else 0.0

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """Elements that have gradients on every pipeline rank: all, or the adapters and a reward model's head."""
        if self.lora is None:
            return tuple(each.total for each in self.held)
        heads = (each.head if self.size.columns == 1 else 0 for each in self.held)
        return tuple(map(sum, zip(self.adapters, heads, strict=True)))

    @cached_property
    def adapter_work(self) -> AdapterWork:
        """What the adapters do."""
        return adapter_work(self.config, self.lora, self.parallel.tensor, self.sequence, self.itemsize)

    @cached_property
    def size(self) -> Sizes:
        """Extents of the model."""
        return sizes_of(self.config)

    @cached_property
    def longest(self) -> int:
        """Positions of the largest micro-batch."""
        return max(pack.tokens for packs in self.packs for pack in packs)


@dataclass(frozen=True)
class Sizes:
    """Extents of a model's layer and head."""

    hidden: int
    ffn: int
    queries: int
    """channels of all query heads"""
    keys: int
    """channels of all key heads, and of all value heads"""
    heads: int
    columns: int
    """of the head: entries of the vocabulary, or one"""
    needs: LayerNeeds


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """Raises UserError for a config that no family can read."""
    family = family_for(config)
    sizes = family.sizes(config)
    return Sizes(
        hidden=sizes["hidden"],
        ffn=sizes["ffn"],
        queries=sizes["queries"],
        keys=sizes["keys"],
        heads=config["num_attention_heads"],
        columns=head_columns(config),
        needs=family.needs(config),
    )
