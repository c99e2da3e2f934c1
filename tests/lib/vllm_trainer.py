"""Our sending end as vLLM's own trainer interface, for programs that drive vLLM's back ends through its factory.

Our commands do not import it: with vLLM's base classes it costs a process some 5 seconds of CPU and 270 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from tulu_mega.bridge.stream import LiveWeights
from tulu_mega.vllm_plugin.gate import BACKEND
from tulu_mega.weight_transfer.attach import Connection
from tulu_mega.weight_transfer.push import SyncReport, push


class Source(WeightSource):
    """A `LiveWeights` under vLLM's type, e.g. for vLLM's own back ends."""

    def __init__(self, weights: LiveWeights):
        self._weights = weights

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(meta.name, meta.dtype, meta.shape) for meta in self._weights.metadata()]

    def held_names(self) -> list[str]:
        return self._weights.held_names()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._weights)


@dataclass
class TrainerInfo(TrainerInitInfo):
    """A connection made by `attach`, which knows its servers: vLLM's client goes unused."""

    backend: ClassVar[str] = BACKEND
    connection: Connection


class TrainerEngine(TrainerWeightTransferEngine[TrainerInfo]):
    """vLLM's verbs; versions count from 1 unless given."""

    init_info_cls = TrainerInfo

    @classmethod
    def trainer_init(
        cls, init_info: TrainerInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> TrainerEngine:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine._connection, engine._version = init_info.connection, 0
        return engine

    def send_weights(self, version: int | None = None) -> SyncReport:
        """Every rank calls it; as `push`."""
        self._version = self._version + 1 if version is None else version
        return push(self._connection, self._version)

    def shutdown(self) -> None:
        self._connection.close()


def register() -> None:
    """Puts the engine into vLLM's registry of trainers."""
    if BACKEND not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(BACKEND, TrainerEngine)
