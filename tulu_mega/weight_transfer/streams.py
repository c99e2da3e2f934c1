"""What an update brings: which tensors, who sends them, and in which buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from tulu_mega.bridge.stream import LiveWeights
from tulu_mega.weight_transfer.adapters import largest_rank
from tulu_mega.weight_transfer.protocol import Bucket, Expected, Manifest
from tulu_mega.weight_transfer.sender import Apart, Sender, sender_buckets


@dataclass(frozen=True)
class Stream:
    """Tensors on their way from this rank; every rank has one."""

    weights: LiveWeights | None
    """None on ranks that hold copies of another rank's."""
    manifest: Manifest
    """Every tensor of the update; empty on ranks without weights."""
    buckets: Sequence[Bucket]
    """Buckets of this rank's pipeline stage, the same on all of its tensor ranks; empty on ranks without weights."""
    adapter: Mapping[str, Any] | None = None
    """As `protocol.Begin` has it."""
    base: str = ""
    """As `protocol.Begin` has it."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(expected.nbytes for expected in self.manifest.values())


@dataclass(frozen=True)
class Streams:
    """What the servers of a connection are sent."""

    every: Stream
    """With each update."""
    first: Stream | None = None
    """Before the first update, to servers that have other weights than those the adapters are for."""
    note: str = ""
    """How adapters go, in a sentence; nothing of a model without."""


def chosen(sender: Sender, about: Mapping[str, Mapping[str, Any]], ranks: Mapping[int, int], bucket_mib: int) -> Streams:
    """Return adapters alone where every server can hold them apart, else whole weights.

    Args:
        about: url -> what a server told of itself.
        ranks: pipeline stage -> rank that sends it.
    """
    whole = _stream(sender.weights, ranks, bucket_mib)
    apart = sender.apart
    if apart is None:
        return Streams(whole)
    rank = largest_rank(apart.config)
    if small := [url for url, each in about.items() if int(each.get("lora_rank") or 0) < rank]:
        note = f"servers get whole weights with the adapters merged: {small[0]} holds no adapters of rank {rank} apart"
        return Streams(whole, note=note)
    every = _stream(apart.adapters, ranks, bucket_mib, adapter=apart.config)
    note = f"servers hold the adapters apart: an update is {every.nbytes / 1e6:,.1f} MB in place of {whole.nbytes / 1e6:,.1f} MB"
    return Streams(every, _stream(apart.weights, ranks, bucket_mib, base=apart.base), note)


def lacking(apart: Apart, bases: Mapping[str, str]) -> list[str]:
    """Return the servers that have other weights than those that the adapters are for.

    Args:
        bases: url -> `base.identity` of what a server has.
    """
    return [url for url, base in bases.items() if not base or base != apart.base]


def _stream(weights: LiveWeights | None, ranks: Mapping[int, int], bucket_mib: int, **what: Any) -> Stream:
    if weights is None:
        return Stream(None, {}, [], **what)
    manifest = {
        meta.name: Expected(meta.shape, str(meta.dtype).removeprefix("torch."), ranks[weights.stage_of[meta.name]])
        for meta in weights.metadata()
    }
    return Stream(weights, manifest, sender_buckets(dist.get_rank(), weights.held_names(), manifest, bucket_mib * 2**20), **what)
