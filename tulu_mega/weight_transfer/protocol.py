"""The messages about weights between trainer ranks and vLLM's workers. Both import it, so it imports neither's libraries.

An update is begin, buckets of any number of senders, commit; each is the ``update_info`` of one ``/update_weights`` call, a JSON
object with one key. See docs/explanation/live_weights.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from tulu_mega.weight_transfer.slots import SLOTS

ALIGNMENT = 64
"""Bytes that a tensor's place in a bucket is a multiple of."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8_e4m3fn": torch.float8_e4m3fn}
"""Types on the wire."""
_LARGEST = 1 << 63
"""Extents, offsets and sizes are below."""


@dataclass(frozen=True)
class Expected:
    """A tensor that an update has to bring."""

    shape: tuple[int, ...]
    dtype: str
    """a key of `DTYPES`"""
    sender: int
    """rank of the trainer that sends it"""

    @property
    def nbytes(self) -> int:
        elements = 1
        for extent in self.shape:
            elements *= extent
        return elements * DTYPES[self.dtype].itemsize


Manifest = Mapping[str, Expected]
"""Hugging Face name -> what it is, of every tensor of the model; tied ones once."""


@dataclass(frozen=True)
class Place:
    """Where in a bucket a tensor lies."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Bucket:
    """One sender's tensors, side by side in one of its buffers."""

    sender: int
    slot: int
    """which of its buffers"""
    places: tuple[Place, ...]

    @property
    def nbytes(self) -> int:
        """From the buffer's start to the last tensor's end."""
        return max((place.offset + place.nbytes for place in self.places), default=0)


class Begin(NamedTuple):
    """What an update is to bring."""

    version: int
    load: bool
    """False for a rehearsal: everything is received and compared, the model keeps its weights."""
    manifest: Manifest
    adapter: dict[str, Any]
    """Of an update that brings a low-rank adapter: the content of its adapter_config.json. Empty for whole weights."""
    base: str
    """Of whole weights that adapters are going to be put beside: `base.identity` of them. Else empty."""


def begin_message(
    version: int, manifest: Manifest, load: bool, adapter: Mapping[str, Any] | None = None, base: str = ""
) -> dict[str, Any]:
    """Arguments are the fields of `Begin`."""
    told = {name: asdict(each) for name, each in manifest.items()}
    return {"begin": {"version": version, "load": load, "manifest": told, "adapter": dict(adapter or {}), "base": base}}


def read_begin(message: Any) -> Begin:
    """
    Raises:
        ValueError: it is no such message.
    """
    version, load, manifest, adapter, base = _fields(message, version=int, load=bool, manifest=dict, adapter=dict, base=str)
    return Begin(version, load, {name: _expected(name, each) for name, each in manifest.items()}, adapter, base)


def _expected(name: str, told: Any) -> Expected:
    shape, dtype, sender = _fields(told, shape=list, dtype=str, sender=int)
    if dtype not in DTYPES or not all(type(extent) is int and 0 <= extent < _LARGEST for extent in shape):
        raise ValueError(
            f"{name[:100]} is of {str(shape)[:100]} and {dtype[:100]!r}, expected whole numbers and one of {list(DTYPES)}"
        )
    return Expected(tuple(shape), dtype, sender)


def _fields(message: Any, **kinds: type) -> list[Any]:
    """The fields of a message, which has these and no other.

    Raises:
        ValueError: one is missing, another is there, or one is of another type.
    """
    if type(message) is not dict or message.keys() != kinds.keys():
        raise ValueError(f"expected an object of {', '.join(kinds)}, got {str(message)[:100]}")
    message = {name: list(value) if type(value) is tuple else value for name, value in message.items()}  # as they are within vLLM
    if wrong := [name for name, kind in kinds.items() if type(message[name]) is not kind]:
        told = ", ".join(f"{name} = {str(message[name])[:100]} (expected {kinds[name].__name__})" for name in wrong)
        raise ValueError(f"a message has a field of the wrong type: {told}")
    return [message[name] for name in kinds]


def bucket_message(version: int, bucket: Bucket) -> dict[str, Any]:
    places = [[place.name, place.offset, place.nbytes] for place in bucket.places]
    return {"bucket": {"version": version, "sender": bucket.sender, "slot": bucket.slot, "places": places}}


def read_bucket(message: Any) -> tuple[int, Bucket]:
    """Version, bucket.

    Raises:
        ValueError: it is no such message.
    """
    version, sender, slot, places = _fields(message, version=int, sender=int, slot=int, places=list)
    if not 0 <= slot < SLOTS:
        raise ValueError(f"slot {slot} is out of range: a sender has {SLOTS} buffers, numbered from 0")
    return version, Bucket(sender, slot, tuple(map(_place, places)))


def _place(told: Any) -> Place:
    if (
        type(told) is not list
        or [type(each) for each in told] != [str, int, int]
        or min(told[1:]) < 0
        or max(told[1:]) >= _LARGEST
    ):
        raise ValueError(f"expected a tensor's name, its offset and its bytes, got {str(told)[:100]}")
    return Place(*told)


def commit_message(version: int, checksums: Mapping[str, str]) -> dict[str, Any]:
    return {"commit": {"version": version, "checksums": dict(checksums)}}


def read_commit(message: Any) -> tuple[int, dict[str, str]]:
    """Version, checksums by name.

    Raises:
        ValueError: it is no such message.
    """
    version, checksums = _fields(message, version=int, checksums=dict)
    if not all(type(each) is str for each in checksums.values()):
        raise ValueError("a commit has checksums that are not text; expected a hexadecimal digest for each tensor")
    return version, checksums


def abandon_message(reason: str) -> dict[str, Any]:
    """Make the message that ends an unfinished update; the weights that it has loaded are unusable."""
    return {"abandon": {"reason": reason}}


def plan_buckets(sender: int, names: Iterable[str], manifest: Manifest, limit: int) -> list[Bucket]:
    """A sender's tensors in their order, as many to a bucket as fit; one larger than the limit has a bucket of its own.

    Invariants: every name is in exactly one bucket; places do not overlap and start at multiples of `ALIGNMENT`; no bucket of
    several tensors is larger than the limit; slots take turns.

    Args:
        limit: bytes.
    """
    buckets: list[Bucket] = []
    places: list[Place] = []
    at = 0
    for name in names:
        nbytes = manifest[name].nbytes
        if places and at + nbytes > limit:
            buckets.append(Bucket(sender, len(buckets) % SLOTS, tuple(places)))
            places, at = [], 0
        places.append(Place(name, at, nbytes))
        at += -(-nbytes // ALIGNMENT) * ALIGNMENT
    if places:
        buckets.append(Bucket(sender, len(buckets) % SLOTS, tuple(places)))
    return buckets


def view(buffer: Tensor, place: Place, expected: Expected) -> Tensor:
    """Return a tensor that lies in a buffer of bytes, without a copy."""
    return buffer[place.offset : place.offset + place.nbytes].view(DTYPES[expected.dtype]).view(expected.shape)


def checksum(data: Tensor) -> str:
    """A hash of a tensor's bytes, the same wherever they lie.

    XXH3 with 128 bits, which is as fast as memory. It finds torn buffers, wrong offsets and bad memory; attackers are kept out by
    the servers' key. A tensor on a GPU is hashed there, by another function: both ends of such transports are GPUs.

    Args:
        data: contiguous.
    """
    flat = data.reshape(-1).view(torch.uint8)
    if data.device.type == "cpu":
        return xxhash.xxh3_128(flat.numpy()).hexdigest()
    return _device_checksum(flat)


_STRIDE = 0x9E3779B97F4A7C15 - 2**64  # odd, as signed
_CHUNK = 2**24


def _device_checksum(flat: Tensor) -> str:
    """Two sums, modulo 2^64, of words times factors that differ from place to place; in integers, so in any order."""
    words = torch.cat([flat, flat.new_zeros(-len(flat) % 4)]).view(torch.int32) if len(flat) % 4 else flat.view(torch.int32)
    sums = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for at in range(0, len(words), _CHUNK):
        part = words[at : at + _CHUNK].long()
        factor = (torch.arange(at + 1, at + 1 + len(part), device=flat.device) * _STRIDE).bitwise_or(1)
        sums[0] += (part * factor).sum()
        mixed = factor * (factor >> 29)
        sums[1] += ((part + mixed) * mixed.bitwise_or(1)).sum()
    low, high = (value & (2**64 - 1) for value in sums.tolist())
    return f"{len(flat):x}-{low:016x}{high:016x}"
