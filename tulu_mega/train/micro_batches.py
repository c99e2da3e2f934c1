"""The micro-batches of a global batch, in the order in which a rank's model chunks take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tulu_mega.records import PackedBatch

LAYERS = frozenset({"positions_T", "cu_seqlens_S1", "key_rows_K", "cu_keys_S1"})
"""What layers read of a micro-batch: all that a pipeline stage needs which neither embeds tokens nor makes losses."""
EMBEDDING = LAYERS | {"tokens_T"}


def needed(embeds: bool, judges: bool) -> frozenset[str] | None:
    """The tensors of a micro-batch that a rank reads on its device; None for all.

    Args:
        embeds: whether it has the embedding.
        judges: whether it has the output layer, whose values losses are made of.
    """
    return None if judges else EMBEDDING if embeds else LAYERS


class SentOnce:
    """Micro-batches that go to the device when the first model chunk asks for them, and stay until the last one had them.

    Args:
        batches: on the host.
        device: the rank's.
        only: what of them to send; see `needed`.
        chunks: the rank's model chunks, each of which meets every micro-batch in order.
    """

    def __init__(self, batches: Sequence[PackedBatch], device: torch.device, only: frozenset[str] | None, chunks: int):
        self._batches, self._device, self._only, self._chunks = batches, device, only, chunks
        self._there: dict[int, tuple[PackedBatch, int]] = {}

    def iterators(self) -> list[Iterator[PackedBatch]]:
        """The micro-batches on the device, for each model chunk."""
        return [map(self._met, range(len(self._batches))) for _ in range(self._chunks)]

    def _met(self, number: int) -> PackedBatch:
        """Return a micro-batch, and note that one chunk fewer still needs it."""
        sent, left = self._there.pop(number, None) or (self._batches[number].to(self._device, self._only), self._chunks)
        if left > 1:
            self._there[number] = sent, left - 1
        return sent
