"""What is found out about ranks that were built without memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tulu_mega.bridge.box import Box
from tulu_mega.distributed.grid import ShardGrid


@dataclass(frozen=True)
class Shard:
    """A parameter of a rank."""

    name: str
    """megatron-core's, with the layer's number in the whole model, from 0"""
    shape: tuple[int, ...]
    itemsize: int
    cut: bool
    """marked as cut over tensor ranks, as the gradient's norm is told; otherwise the same on all of them"""
    blocks: int = 0
    """bytes, where it is quantized"""

    @property
    def elements(self) -> int:
        """Of the shard."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of the shard."""
        return self.blocks or self.elements * self.itemsize


@dataclass(frozen=True)
class Stored:
    """A box of a tensor of the distributed checkpoint that a rank writes."""

    key: str
    whole: tuple[int, ...]
    """shape of the tensor in the checkpoint; layers are its first axis"""
    box: Box


@dataclass(frozen=True)
class Training:
    """What a rank holds beside its parameters to train them. D = DP x CP ranks share its gradients."""

    sharded: bool
    """whether the D ranks share the optimizer's state out; otherwise each has all of it"""
    parameter_buffer: int
    """bytes; more than the parameters by padding. 0 where parameters have no buffer (no distributed optimizer)"""
    gradient_buffer: int
    """bytes, float32"""
    slice: int
    """elements of the buffers that each of the D ranks updates, padding included"""
    held_D: tuple[int, ...]
    """of these, elements of parameters, rank by rank"""
    saved_D: tuple[int, ...]
    """elements of each moment and of the main parameters that each of the D ranks writes at a save"""
    main: int
    """elements of the parameters in this rank's own optimizer"""
    optimizer_bytes: int
    """this rank's own float32 main parameters (where they are no parameters of the model's) and moments"""


@dataclass(frozen=True)
class Sending:
    """What a rank sends to the rollout engines, or to the rank that does."""

    tensors: dict[str, int]
    """Hugging Face name -> bytes, of whole tensors that it sends to every engine, in their order; empty on ranks that do not"""
    buckets: int
    buffers: int
    """bytes of the buffers that it sends from"""
    to_first: int
    """bytes that it sends to the first tensor rank of its stage"""

    @property
    def nbytes(self) -> int:
        """Sent to each engine."""
        return sum(self.tensors.values())


@dataclass(frozen=True)
class RankReport:
    """A rank that was built."""

    rank: int
    stage: int
    """pipeline rank"""
    tensor_rank: int
    copy: int
    """which of the DP x CP ranks that hold the same parameters"""
    layers: tuple[int, ...]
    """transformer layers of each chunk"""
    shards: tuple[Shard, ...]
    adapters: tuple[Shard, ...]
    """what alone trains where adapters do: they, and a reward model's head"""
    stored: tuple[Stored, ...]
    """of the model's weights that train"""
    weights_saved: int
    """bytes of the model's weights that it writes at a save"""
    optimizer_saved: int
    """bytes of optimizer state that it writes at a save"""
    beside: int
    """bytes of the parameters of models that are held for scoring only"""
    training: Training | None
    sending: Sending | None

    @property
    def parameters(self) -> int:
        """Elements of its parameters."""
        return sum(shard.elements for shard in self.shards)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of its parameters, adapters among them, without padding of buffers."""
        return sum({shard.name: shard.nbytes for shard in (*self.shards, *self.adapters)}.values())

    @property
    def trained(self) -> int:
        """Elements of the parameters that train."""
        return sum(shard.elements for shard in self.adapters) if self.adapters else self.parameters

    @classmethod
    def read(cls, told: dict[str, Any]) -> RankReport:
        """From JSON."""
        shards, adapters = (
            tuple(Shard(each["name"], tuple(each["shape"]), each["itemsize"], each["cut"], each["blocks"]) for each in told[kind])
            for kind in ("shards", "adapters")
        )
        stored = tuple(
            Stored(each["key"], tuple(each["whole"]), Box((start, stop) for start, stop in each["box"]))
            for each in told["stored"]
        )
        training = told["training"] and Training(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in told["training"].items()}
        )
        sending = told["sending"] and Sending(**told["sending"])
        own = {"shards": shards, "adapters": adapters, "stored": stored, "training": training, "sending": sending}
        return cls(**{**told, **own, "layers": tuple(told["layers"])})


@dataclass(frozen=True)
class DryRun:
    """A layout of which every distinct rank was built."""

    layout: ShardGrid
    """its sizes; the rank says nothing"""
    ranks: tuple[RankReport, ...]
    """those of the first copy, by stage and tensor rank"""
    replicas: int
    """ranks of the last copy that were built to see that they are the same"""
    hf_tensors: int
    hf_parameters: int
    """elements of the model, as Hugging Face's transformers builds it"""
    problems: tuple[str, ...]
    seconds: float
    peak_bytes: int
    """of memory, of the process that built the ranks"""
    value: DryRun | None = None
    """of the value model beside; its problems are among the policy's as well"""
