"""The receiving end of weights, inside vLLM's workers: our engine behind vLLM's weight-transfer API.

Its methods never raise: vLLM's multi-process executor stops reading the workers' replies at the first that failed, and from then
on takes old replies for new ones. What goes wrong is kept, refuses everything after it, and is read through `WeightsReport`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from tulu_mega.weight_transfer.ledger import Account
from tulu_mega.weight_transfer.protocol import Bucket, checksum, read_begin, read_bucket, view
from tulu_mega.weight_transfer.transports import Inbox, inbox

logger = init_logger("vllm.tulu_mega")  # vLLM shows its own loggers only


@dataclass
class Senders(WeightTransferInitInfo):
    """Whom to receive from."""

    endpoints: dict[str, dict[str, Any]]
    """trainer rank -> its outbox"""
    timeout: float
    """seconds that waiting for a sender may take"""


@dataclass
class Message(WeightTransferUpdateInfo):
    """One message of `rollout.protocol`; exactly one field is there."""

    begin: dict[str, Any] | None = None
    bucket: dict[str, Any] | None = None
    commit: dict[str, Any] | None = None
    abandon: dict[str, Any] | None = None


class LiveWeightsEngine(WeightTransferEngine[Senders, Message]):
    """Receives, hashes and loads an update's buckets; the model counts as broken from the first of them until all are right."""

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
        self._account: Account | None = None
        self._load = True
        self._committed = False
        self._broken: str | None = None
        """why the model's weights are not whole"""
        if vllm_config.load_config.load_format == "dummy":
            self._broken = "the model was started with random weights and has had no update"
        self._torn: str | None = None
        """the same, once there are no weights but parts of several; vLLM runs random ones to measure itself"""
        self._tied = _tied_layers(model)
        """parameters that are another layer's too, by name, with the layer that takes them over"""
        self._expected: set[str] = set()
        """vLLM's parameters, under the names it loads them by"""
        self._loaded: set[str] = set()
        """vLLM's parameters that this update reached"""
        self._feeds: dict[str, frozenset[str]] = {}
        """Hugging Face name -> vLLM's parameters that it goes into, as learned from earlier updates"""
        self._seconds = {"receive": 0.0, "hash": 0.0, "load": 0.0}
        # The last line behind the gate: rather no answer than one from half of the weights. vLLM's engine ends with the error.
        model.register_forward_pre_hook(self._refuse_when_broken)

    # vLLM's interface

    def init_transfer_engine(self, init_info: Senders) -> None:
        """Attaches to the senders, in place of those before."""
        self.shutdown()
        try:
            for rank, endpoint in init_info.endpoints.items():
                self._inboxes[int(rank)] = inbox(endpoint, self._worker, self.device, init_info.timeout)
        except Exception as error:
            logger.exception("attaching to trainer rank %s failed", rank)
            self._unattached = [f"worker {self._worker}: trainer rank {rank} cannot be reached: {_told(error)}"]

    def start_weight_update(self) -> None:
        """Opens an update; nothing happens to the weights before its begin."""
        self._open, self._committed, self._account = True, False, None
        self._seconds = dict.fromkeys(self._seconds, 0.0)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Takes a message. The base class waits for an accelerator afterwards, which a CPU build lacks."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            logger.exception("a message about weights failed")
            if self._account is None:
                self._account = Account(self._worker, -1, {})
            self._account.wrong(_told(error))

    def receive_weights(self, update_info: Message) -> None:
        """One step of an update."""
        if update_info.begin is not None:
            self._begin(*read_begin(update_info.begin))
        elif self._account is None:
            raise RuntimeError("got a part of an update that has not begun")
        elif update_info.bucket is not None:
            self._bucket(*read_bucket(update_info.bucket))
        elif update_info.commit is not None:
            self._commit(update_info.commit["version"], update_info.commit["checksums"])
        elif update_info.abandon is not None:
            self._account.wrong(update_info.abandon["reason"])

    def finish_weight_update(self) -> None:
        """Closes an update. One that was not committed leaves the model broken, in a state that the next can begin from."""
        if self._account is not None and self._load and not self._committed:
            try:
                finalize_layerwise_reload(self.model, self.model_config)
            except Exception as error:
                logger.exception("leaving an unfinished update failed")
                self._account.wrong(f"could not be left: {_told(error)}")
        self._open = False

    def shutdown(self) -> None:
        """Lets go of the senders."""
        for each in self._inboxes.values():
            each.close()
        self._inboxes, self._unattached = {}, []

    # An update

    def _begin(self, version: int, load: bool, manifest: Mapping[str, Any]) -> None:
        if not self._open or self._account is not None:
            raise RuntimeError(f"update {version} cannot begin: another is open; start_weight_update comes first")
        self._account, self._load, self._loaded = Account(self._worker, version, manifest), load, set()
        self._account.problems += self._unattached
        for sender in sorted({each.sender for each in manifest.values()} - self._inboxes.keys()):
            self._account.wrong(f"is to come from trainer rank {sender}, to which this worker is not attached")
        if load:
            self._broken = self._torn = f"update {version} was begun and has not been committed"
            initialize_layerwise_reload(self.model)
            self._expected = {name for name, _ in self.model.named_parameters()} - self._tied.keys() - _cache_scales(self.model)

    def _bucket(self, version: int, bucket: Bucket) -> None:
        account = self._account
        start = time.perf_counter()
        source = self._inboxes.get(bucket.sender)
        if source is None:
            account.wrong(f"a bucket came from trainer rank {bucket.sender}, to which this worker is not attached")
            return
        buffer = source.receive(bucket.slot, bucket.nbytes)  # whatever is wrong: a broadcast wants all of its ranks
        self._seconds["receive"] += time.perf_counter() - start
        if account.problems or not account.check(version, bucket, len(buffer)):
            return
        tensors = []
        start = time.perf_counter()
        for place in bucket.places:
            tensor = view(buffer, place, account.manifest[place.name])
            account.arrived(place.name, checksum(tensor))
            tensors.append((place.name, tensor))
        self._seconds["hash"] += time.perf_counter() - start
        if self._load:
            start = time.perf_counter()
            try:
                self._load_tensors(tensors)
            finally:
                _own_memory(self.model, buffer)
            self._seconds["load"] += time.perf_counter() - start

    def _load_tensors(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Through vLLM's own loaders, and learns which of its parameters each tensor goes into."""
        known = all(name in self._feeds for name, _ in tensors)
        for part in [tensors] if known else [[each] for each in tensors]:
            names = [name for name, _ in part]
            taken: list[str] = []
            try:
                loaded = self.model.load_weights(_noting(part, taken))
            except Exception as error:
                logger.exception("loading %s failed", taken)
                self._account.not_loaded(taken[-1], f"was refused by vLLM: {_told(error)}")
                return
            if not known and not loaded:
                self._account.not_loaded(names[0], "has no place in vLLM's model")
                return
            if not known:
                self._feeds[names[0]] = frozenset(loaded)
            missed = {name for name in names if not self._feeds[name] <= loaded}
            for name in sorted(missed):
                self._account.not_loaded(name, f"did not reach {', '.join(sorted(self._feeds[name] - loaded))}")
            self._loaded |= loaded

    def _commit(self, version: int, checksums: Mapping[str, str]) -> None:
        account = self._account
        if not account.problems:  # else nothing was taken after the first
            account.compare(version, checksums)
        if not self._load:
            self._committed = not account.problems
            return
        if not account.problems:
            for name in sorted(self._expected - self._loaded):
                account.wrong(f"vLLM's parameter {name} got nothing: the manifest lacks what it is made of")
            for problem in _half_loaded(self.model):
                account.wrong(problem)
        if not account.problems:
            start = time.perf_counter()
            finalize_layerwise_reload(self.model, self.model_config)
            for layer in self._tied.values():  # vLLM's reload passes them by, and on a CPU they compute with a packed copy
                if isinstance(method := getattr(layer, "quant_method", None), QuantizeMethodBase):
                    method.process_weights_after_loading(layer)
            self._seconds["load"] += time.perf_counter() - start
            self._committed, self._broken, self._torn = True, None, None

    # Its report

    def status(self) -> dict[str, Any]:
        """As `WeightsReport.weights_status`."""
        account = self._account
        return {
            "worker": self._worker,
            "fp8": self._fp8,
            "version": account.version if account else None,
            "open": self._open,
            "committed": self._open and self._committed,
            "whole": self._broken is None,
            "broken": self._broken,
            "unattached": self._unattached,
            "problems": list(account.problems) if account else [],
            "tensors": len(account.checksums) if account else 0,
            "bytes": account.nbytes if account else 0,
            "seconds": self._seconds,
        }

    def arrived(self) -> dict[str, str]:
        """As `WeightsReport.arrived_checksums`."""
        return dict(self._account.checksums) if self._account else {}

    def _refuse_when_broken(self, _model: nn.Module, _arguments: tuple) -> None:
        if self._torn:
            raise RuntimeError(f"worker {self._worker}: {self._torn}; no response is made of such weights")


class WeightsReport:
    """What vLLM's workers have beside their own methods, for ``/collective_rpc`` (``--worker-extension-cls``)."""

    def weights_status(self) -> dict[str, Any]:
        """State of this worker's weights.

        Returns:
            ``worker`` its rank; ``fp8`` whether its layers are FP8 blocks; ``version`` of the latest update it heard of;
            ``open`` whether that is not finished; ``committed`` whether the open update came whole; ``whole`` whether the
            model's weights are of one version, and ``broken`` why not; ``unattached`` what is wrong with the connection to the
            senders, ``problems`` with the update; ``tensors`` and ``bytes`` that arrived; ``seconds`` by activity.
        """
        return self.weight_transfer_engine.status()

    def arrived_checksums(self) -> dict[str, str]:
        """Hugging Face name -> hash of the bytes that arrived in the latest update, taken before vLLM did anything with them."""
        return self.weight_transfer_engine.arrived()


def _told(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


def _tied_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Of each parameter that several layers share, all names but the first, with the layer of that name."""
    seen: set[int] = set()
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            tied[name] = model.get_submodule(name.rpartition(".")[0])
        seen.add(id(parameter))
    return tied


def _cache_scales(model: nn.Module) -> set[str]:
    """What attention of a quantized model has beside its projections: scales of cached keys and values, which no trainer has.
    vLLM keeps those that it has."""
    return {
        f"{name}.{scale}"
        for name, layer in model.named_modules()
        if is_deferred_attention_layer(layer)
        for scale, _ in layer.named_parameters(recurse=False)
    }


def _noting(tensors: list[tuple[str, Tensor]], taken: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Notes the names of tensors as they are taken: vLLM takes the next when it is done with the one before."""
    for name, tensor in tensors:
        taken.append(name)
        yield name, tensor


def _own_memory(model: nn.Module, buffer: Tensor) -> None:
    """Copies what vLLM's loaders keep until a layer is complete out of a buffer that is about to be filled again."""
    first, last = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    for kept in _kept_arguments(model):
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.device == buffer.device and first <= value.data_ptr() < last:
                kept[name] = value.clone()


def _kept_arguments(model: nn.Module) -> Iterable[dict[str, Any]]:
    for layer in model.modules():
        for _, bound in get_layerwise_info(layer).loaded_weights:
            yield bound.arguments


def _half_loaded(model: nn.Module) -> Iterable[str]:
    """What is wrong with layers that only a part has come of: vLLM would process them as they are."""
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or is_deferred_attention_layer(layer) or not info.load_numel:
            continue  # complete, or without weights of its own
        want = _loadable(layer, info.load_numel_total)
        if info.load_numel < want:
            yield f"vLLM's layer {name} got {info.load_numel} of its {want} weights: the manifest lacks what it is made of"


def _loadable(layer: nn.Module, total: int) -> int:
    """Elements that a layer takes: all, but for the rows that pad a vocabulary."""
    if not isinstance(layer, VocabParallelEmbedding):
        return total
    shard = layer.shard_indices
    padding = layer.num_embeddings_per_partition - (shard.org_vocab_end_index - shard.org_vocab_start_index)
    return total - padding * layer.weight.shape[1]
