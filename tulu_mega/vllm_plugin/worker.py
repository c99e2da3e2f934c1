"""The receiving end of weights, inside vLLM's workers: our engine behind vLLM's weight-transfer API.

Its methods never raise: vLLM's multi-process executor stops reading the workers' replies at the first that failed, and from then
on takes old replies for new ones. What goes wrong is kept, refuses everything after it, and is read through `WeightsReport`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.logger import init_logger

from tulu_mega.vllm_plugin.adapters import AdapterLoader
from tulu_mega.vllm_plugin.loading import ModelLoader, reason
from tulu_mega.weight_transfer import base
from tulu_mega.weight_transfer.ledger import Ledger
from tulu_mega.weight_transfer.protocol import Begin, Bucket, checksum, read_begin, read_bucket, read_commit, view
from tulu_mega.weight_transfer.transports import Inbox, named

logger = init_logger("vllm.tulu_mega")  # vLLM shows its own loggers only


@dataclass
class Senders(WeightTransferInitInfo):
    """The senders that a worker attaches to."""

    endpoints: dict[str, dict[str, Any]]
    """trainer rank -> its outbox"""
    timeout: float
    """seconds that waiting for a sender may take"""


@dataclass
class Message(WeightTransferUpdateInfo):
    """One message of `weight_transfer.protocol`; exactly one field is there."""

    begin: dict[str, Any] | None = None
    bucket: dict[str, Any] | None = None
    commit: dict[str, Any] | None = None
    abandon: dict[str, Any] | None = None


class LiveWeightsEngine(WeightTransferEngine[Senders, Message]):
    """Receives, hashes and loads the buckets of an update. From the first bucket to the commit the model counts as broken."""

    init_info_cls = Senders
    update_info_cls = Message
    supports_draft_weight_update = False

    def __init__(self, config, vllm_config, device, model):
        super().__init__(config, vllm_config, device, model)
        self._worker: int = vllm_config.parallel_config.rank
        self._fp8 = getattr(vllm_config.quant_config, "weight_block_size", None) is not None
        self._inboxes: dict[int, Inbox] = {}
        self._unattached: list[str] = []
        """what is wrong with the connection to the senders"""
        self._open = False
        self._ledger: Ledger | None = None
        self._begun: Begin | None = None
        self._committed = False
        self._waiting = False
        """whether an adapter came whole and is not in its place yet"""
        self._broken: str | None = None
        """why the model's weights are not whole"""
        self._base = ""
        """`base.identity` of the model's weights, where they are some that adapters may be for"""
        if vllm_config.load_config.load_format == "dummy":
            self._broken = "the model was started with random weights and has had no update"
        else:
            self._base = base.identity(self.model_config.model, str(self.model_config.dtype).removeprefix("torch."))
        self._torn: str | None = None
        """the same, once there are no weights but parts of several; vLLM runs random ones to measure itself"""
        self._weights, self._adapters = ModelLoader(model, self.model_config), AdapterLoader(model)
        self._loader: ModelLoader | AdapterLoader | None = None
        """of the two the one that the open update goes to, once its loading has begun"""
        self._seconds = {"receive": 0.0, "hash": 0.0, "load": 0.0}
        # Last resort behind the gate: a forward pass fails, and vLLM's engine ends, if the weights are partly updated.
        model.register_forward_pre_hook(self._refuse_when_broken)

    # vLLM's interface

    def init_transfer_engine(self, init_info: Senders) -> None:
        """Attaches to the senders, in place of those before."""
        self.shutdown()
        rank = None
        try:
            for rank, endpoint in init_info.endpoints.items():
                transport = named(endpoint["kind"])
                self._inboxes[int(rank)] = transport.inbox(endpoint, self._worker, self.device, init_info.timeout)
        except Exception as error:
            logger.exception("attaching to trainer rank %s failed", rank)
            self._unattached = [f"worker {self._worker}: trainer rank {rank} cannot be reached: {reason(error)}"]

    def start_weight_update(self) -> None:
        """Opens an update; nothing happens to the weights before its begin."""
        self._open, self._committed, self._ledger, self._loader = True, False, None, None
        self._seconds = dict.fromkeys(self._seconds, 0.0)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Takes a message. The base class waits for an accelerator afterwards, which a CPU build lacks."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            logger.exception("a message about weights failed")
            if self._ledger is None:
                self._ledger = Ledger(self._worker, -1, {})
            self._ledger.wrong(reason(error))

    def receive_weights(self, update_info: Message) -> None:
        """One step of an update."""
        if update_info.begin is not None:
            self._begin(read_begin(update_info.begin))
        elif self._ledger is None:
            raise RuntimeError("got a part of an update that has not begun")
        elif update_info.bucket is not None:
            self._bucket(*read_bucket(update_info.bucket))
        elif update_info.commit is not None:
            self._commit(*read_commit(update_info.commit))
        elif update_info.abandon is not None:
            self._ledger.wrong(update_info.abandon["reason"])

    def finish_weight_update(self) -> None:
        """Close an update. An uncommitted update leaves the model broken, in a state from which the next update can begin."""
        if self._loader is not None and not self._committed:
            try:
                self._loader.leave()
            except Exception as error:
                logger.exception("leaving an unfinished update failed")
                self._ledger.wrong(f"could not be left: {reason(error)}")
        self._open = False

    def shutdown(self) -> None:
        """Release the senders' buffers and connections."""
        for each in self._inboxes.values():
            each.close()
        self._inboxes, self._unattached = {}, []

    # An update

    def _begin(self, begin: Begin) -> None:
        if not self._open or self._ledger is not None:
            raise RuntimeError(f"update {begin.version} cannot begin: another is open; start_weight_update comes first")
        self._ledger, self._begun = Ledger(self._worker, begin.version, begin.manifest), begin
        self._ledger.problems += self._unattached
        for sender in sorted({each.sender for each in begin.manifest.values()} - self._inboxes.keys()):
            self._ledger.wrong(f"is to come from trainer rank {sender}, to which this worker is not attached")
        if begin.adapter and not self._adapters.possible:
            self._ledger.wrong("brings an adapter alone, and this server was not started to hold any apart")
            return
        if not begin.load:
            return
        self._waiting = False
        self._broken = self._torn = f"update {begin.version} was begun and has not been committed"
        if begin.adapter:
            self._loader = self._adapters
            self._adapters.begin(begin.adapter)
        else:
            self._loader, self._base = self._weights, ""
            self._adapters.forget()
            self._weights.begin()

    def _bucket(self, version: int, bucket: Bucket) -> None:
        ledger = self._ledger
        start = time.perf_counter()
        source = self._inboxes.get(bucket.sender)
        if source is None:
            ledger.wrong(f"a bucket came from trainer rank {bucket.sender}, to which this worker is not attached")
            return
        buffer = source.receive(bucket.slot, bucket.nbytes)  # whatever is wrong: a broadcast wants all of its ranks
        self._seconds["receive"] += time.perf_counter() - start
        if ledger.problems or not ledger.check(version, bucket, len(buffer)):
            return
        tensors = []
        start = time.perf_counter()
        for place in bucket.places:
            tensor = view(buffer, place, ledger.manifest[place.name])
            ledger.arrived(place.name, checksum(tensor))
            tensors.append((place.name, tensor))
        self._seconds["hash"] += time.perf_counter() - start
        if self._loader is not None:
            start = time.perf_counter()
            self._loader.load(tensors, buffer, ledger)
            self._seconds["load"] += time.perf_counter() - start

    def _commit(self, version: int, checksums: Mapping[str, str]) -> None:
        ledger = self._ledger
        if not ledger.problems:  # else nothing was taken after the first
            ledger.compare(version, checksums)
        if self._loader is None:
            self._committed = not ledger.problems
            return
        if not ledger.problems:
            self._loader.check(ledger)
        if ledger.problems:
            return
        start = time.perf_counter()
        if self._loader is self._adapters:
            self._adapters.finish(version)
            self._waiting = True
            self._broken = self._torn = f"the adapter of update {version} is not in its place yet; POST /resume puts it there"
        else:
            self._weights.finish()
            self._base, self._broken, self._torn = self._begun.base, None, None
        self._seconds["load"] += time.perf_counter() - start
        self._committed = True

    def place(self) -> dict[str, Any]:
        """As `WeightsReport.place_adapter`."""
        if not self._open and self._adapters.version is not None:
            try:
                self._adapters.place()
            except Exception as error:
                logger.exception("putting an adapter in its place failed")
                self._broken = self._torn = f"the adapter could not be put in its place: {reason(error)}"
            else:
                if self._waiting:
                    self._waiting, self._broken, self._torn = False, None, None
        return self.status()

    # Its report

    def status(self) -> dict[str, Any]:
        """As `WeightsReport.weights_status`."""
        ledger = self._ledger
        return {
            "worker": self._worker,
            "fp8": self._fp8,
            "base": self._base,
            "adapter": self._adapters.version,
            "version": ledger.version if ledger else None,
            "open": self._open,
            "committed": self._open and self._committed,
            "whole": self._broken is None,
            "broken": self._broken,
            "unattached": self._unattached,
            "problems": list(ledger.problems) if ledger else [],
            "tensors": len(ledger.checksums) if ledger else 0,
            "bytes": ledger.nbytes if ledger else 0,
            "seconds": self._seconds,
        }

    def arrived(self) -> dict[str, str]:
        """As `WeightsReport.arrived_checksums`."""
        return dict(self._ledger.checksums) if self._ledger else {}

    def _refuse_when_broken(self, _model: nn.Module, _arguments: tuple) -> None:
        if self._torn:
            raise RuntimeError(f"worker {self._worker}: {self._torn}; no response is made of such weights")


class WeightsReport:
    """Methods that vLLM's workers get for ``/collective_rpc`` (``--worker-extension-cls``)."""

    def weights_status(self) -> dict[str, Any]:
        """State of this worker's weights.

        Returns:
            ``worker`` its rank; ``fp8`` whether its layers are FP8 blocks; ``base`` a word for its weights (`base.identity`),
            empty where they are of a training's middle; ``adapter`` version of the adapter that it has; ``version`` of the
            latest update it heard of;
            ``open`` whether that is not finished; ``committed`` whether the open update came whole; ``whole`` whether the
            model's weights are of one version, and ``broken`` why not; ``unattached`` what is wrong with the connection to the
            senders, ``problems`` with the update; ``tensors`` and ``bytes`` that arrived; ``seconds`` by activity.
        """
        return self.weight_transfer_engine.status()

    def place_adapter(self) -> dict[str, Any]:
        """Puts the adapter of the latest update in its place; the gate calls it before the server serves again. The same
        figures."""
        return self.weight_transfer_engine.place()

    def arrived_checksums(self) -> dict[str, str]:
        """Hugging Face name -> hash of the bytes that arrived in the latest update, taken before vLLM did anything with them."""
        return self.weight_transfer_engine.arrived()
