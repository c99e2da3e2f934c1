"""Reference log-probabilities: scored once with the initial weights, kept on disk by content, read by every run that fits.

A cache is a directory named after what its values are made of (weights, data, tokenizer, template, precision), with a
safetensors file for every few thousand sequences. The files appear whole, so that filling goes on where it was interrupted, under
whatever layout; what is missing or damaged is scored again, always with the initial weights.

Sums over the trained tokens are kept. Means, where a loss takes them, are made from them: one cache serves every loss.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from tulu_mega.bridge.files.hf_writer import write_durably
from tulu_mega.data.store import TokenStore
from tulu_mega.distributed.collectives import from_lead, gathered, together
from tulu_mega.errors import UserError
from tulu_mega.pins.digest import digest
from tulu_mega.records import PackedBatch
from tulu_mega.train.engine import Engine
from tulu_mega.train.scoring import score_rows

VERSION = 1
"""Version of the cache. It grows whenever the same content gives other values or another form of the files."""
QUANTITY = "sum of log-probabilities over trained tokens"
PART = 8192
"""Sequences in a file."""


@dataclass(frozen=True)
class ReferenceCache:
    """The files of one cache."""

    directory: Path
    key: str
    sequences: int

    @classmethod
    def under(cls, root: Path, key: str, sequences: int) -> ReferenceCache:
        """That of this content in a directory of caches."""
        return cls(root / key[:32], key, sequences)

    def parts(self) -> list[range]:
        """The sequences of each file."""
        return [range(start, min(start + PART, self.sequences)) for start in range(0, self.sequences, PART)]

    def missing(self) -> list[range]:
        """Return the parts that are absent, not whole, or of another content."""
        return [part for part in self.parts() if self._read(part) is None]

    def values(self) -> np.ndarray:
        """float64 [sequences].

        Raises:
            RuntimeError: when the cache is not complete.
        """
        read = [self._read(part) for part in self.parts()]
        if any(values is None for values in read):
            raise RuntimeError(f"{self.directory}: not complete")
        return np.concatenate(read)

    def write(self, part: range, values: np.ndarray) -> None:
        """Write a part, whole or not at all.

        Args:
            values: float64, of each of the part's sequences.

        Raises:
            OSError: it cannot be written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self._file(part)
        partial = file.with_name(f".{file.name}.{os.getpid()}")  # several runs may fill the same cache
        told = {"key": self.key, "quantity": QUANTITY, "digest": _digest(values)}
        write_durably(partial, save({"logp": values}, told))
        partial.replace(file)

    def _file(self, part: range) -> Path:
        return self.directory / f"logp-{part.start:09d}-{part.stop:09d}.safetensors"

    def _read(self, part: range) -> np.ndarray | None:
        try:
            with safe_open(self._file(part), framework="numpy") as file:
                values = file.get_tensor("logp")
                told = file.metadata() or {}
                # older files have no digest
                same = told.get("key") == self.key and told.get("digest") in (None, _digest(values))
        except (OSError, SafetensorError):
            return None
        return values if same and values.shape == (len(part),) and np.isfinite(values).all() else None


def _digest(values: np.ndarray) -> str:
    return blake3(np.ascontiguousarray(values).tobytes()).hexdigest()


def content_key(weights: str, dtype: str, megatron: dict, store: TokenStore) -> str:
    """Return a digest of everything that decides the values. The layout does not.

    Args:
        weights: see :func:`weights_digest`.
        dtype: precision of the forward pass.
        megatron: fields of megatron-core's config, of `precision` and `[megatron]`.
        store: tokens and labels, by their own content's key.
    """
    parts = [VERSION, QUANTITY, weights, dtype, megatron, store.key, len(store)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weights_digest(model: Path, known: Mapping[str, str]) -> str:
    """Digest of the weights and the configuration in a directory of a model or of adapters; every rank calls it, each hashes
    some of the files.

    Args:
        known: digests by file, of what has been read already.
    """
    patterns = ("*.safetensors", "*.distcp", "config.json", "adapter_config.json")
    files = sorted(file for pattern in patterns for file in model.glob(pattern))
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = [(file.name, known.get(file.name) or digest(file)) for file in files[rank::size]]
    return hashlib.sha256(json.dumps(sorted(pair for part in gathered(mine) for pair in part)).encode()).hexdigest()


def missing_parts(cache: ReferenceCache) -> list[range]:
    """Return on every rank the parts that rank 0 finds missing."""
    return from_lead(cache.missing() if dist.get_rank() == 0 else [])


def fill(
    engine: Engine,
    store: TokenStore,
    cache: ReferenceCache,
    parts: list[range],
    capacity: int,
    told: Callable[[str], None],
) -> None:
    """Score the missing parts with the engine's weights, which must be the initial ones. Every rank calls it.

    Args:
        capacity: tokens a packed micro-batch may hold.
        told: called on rank 0 with lines about the progress.

    Raises:
        UserError: on every rank, when the cache cannot be written or a value is not finite.
    """
    lead = engine.topology.rank == 0
    for done, part in enumerate(parts, 1):
        found = score_rows(engine, [store[row] for row in part], capacity, trained_sums)
        with together(f"the reference log-probabilities could not be written to {cache.directory}"):
            if lead:
                values = np.array([found[row] for row in part])
                if not np.isfinite(values).all():
                    at = part[int(np.flatnonzero(~np.isfinite(values))[0])]
                    value = values[at - part.start]
                    problem = f"{store.where(at)}: the reference model gives {value}, expected a finite number"
                    raise UserError(f"{problem}; look at model and row")
                cache.write(part, values)
                told(f"reference log-probabilities: {sum(map(len, parts[:done])):,} of {sum(map(len, parts)):,} sequences")


def trained_sums(batch: PackedBatch, logp_T: Tensor) -> dict[int, float]:
    """By row: the sum over its trained tokens, in float64."""
    sums_S = torch.zeros(len(batch.rows_S), dtype=torch.float64).index_add_(0, batch.segments_T, logp_T.double())
    return {row: value for row, value in zip(batch.rows_S.tolist(), sums_S.tolist(), strict=True) if row >= 0}
