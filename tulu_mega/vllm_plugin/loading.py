"""Loading an update's tensors into vLLM's model, through vLLM's own loaders and its layerwise reload."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from tulu_mega.weight_transfer.ledger import Ledger

logger = init_logger("vllm.tulu_mega")  # vLLM shows its own loggers only
_WRAPPED = ".base_layer."
"""In the names of weights that have places for adapters beside them; vLLM loads them by their names without it."""


class ModelLoader:
    """Loads updates into one worker's model, and notes in the update's ledger what vLLM did not take.

    Args:
        model: vLLM's, with this worker's shares.
        model_config: vLLM's.
    """

    def __init__(self, model: nn.Module, model_config: Any):
        self._model, self._model_config = model, model_config
        self._tied = _tied_layers(model)
        """parameters that are another layer's too, by name, with the layer that takes them over"""
        self._expected: set[str] = set()
        """vLLM's parameters, under the names it loads them by"""
        self._loaded: set[str] = set()
        """vLLM's parameters that this update reached"""
        self._feeds: dict[str, frozenset[str]] = {}
        """Hugging Face name -> vLLM's parameters that it goes into, as learned from earlier updates"""

    def begin(self) -> None:
        """Take the model apart for loading; it must not compute before `finish`."""
        self._loaded = set()
        initialize_layerwise_reload(self._model)
        held = {name.replace(_WRAPPED, ".") for name, _ in self._model.named_parameters()}
        self._expected = held - self._tied.keys() - _cache_scales(self._model)

    def load(self, tensors: list[tuple[str, Tensor]], buffer: Tensor, ledger: Ledger) -> None:
        """Loads a bucket's tensors and learns which of vLLM's parameters each goes into.

        Args:
            buffer: memory that the tensors lie in; it may be filled again afterwards.
        """
        try:
            self._load(tensors, ledger)
        finally:
            _own_memory(self._model, buffer)

    def _load(self, tensors: list[tuple[str, Tensor]], ledger: Ledger) -> None:
        known = all(name in self._feeds for name, _ in tensors)
        for part in [tensors] if known else [[each] for each in tensors]:
            names = [name for name, _ in part]
            taken: list[str] = []
            try:
                loaded = self._model.load_weights(_noting(part, taken))
            except Exception as error:
                logger.exception("loading %s failed", taken)
                ledger.not_loaded(taken[-1], f"was refused by vLLM: {reason(error)}")
                return
            if not known and not loaded:
                ledger.not_loaded(names[0], "has no place in vLLM's model")
                return
            if not known:
                self._feeds[names[0]] = frozenset(loaded)
            missed = {name for name in names if not self._feeds[name] <= loaded}
            for name in sorted(missed):
                ledger.not_loaded(name, f"did not reach {', '.join(sorted(self._feeds[name] - loaded))}")
            self._loaded |= loaded

    def check(self, ledger: Ledger) -> None:
        """Note parameters and layers that the update did not reach, or reached in part."""
        for name in sorted(self._expected - self._loaded):
            ledger.wrong(f"vLLM's parameter {name} got nothing: the manifest lacks what it is made of")
        for problem in _half_loaded(self._model):
            ledger.wrong(problem)

    def finish(self) -> None:
        """Put the model together again, with the loaded weights."""
        self.leave()
        for layer in self._tied.values():  # vLLM's reload passes them by, and on a CPU they compute with a packed copy
            if isinstance(method := getattr(layer, "quant_method", None), QuantizeMethodBase):
                method.process_weights_after_loading(layer)

    def leave(self) -> None:
        """End an update that did not come whole. The model stays broken, in a state from which the next update can begin."""
        finalize_layerwise_reload(self._model, self._model_config)


def reason(error: Exception) -> str:
    """An error in one line for a ledger: its type and what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


def _tied_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the names of shared parameters, all but the first of each, with the layer of that name."""
    seen: set[int] = set()
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            tied[name] = model.get_submodule(name.rpartition(".")[0])
        seen.add(id(parameter))
    return tied


def _cache_scales(model: nn.Module) -> set[str]:
    """Names of the scales of cached keys and values, which a quantized model has and no trainer sends. vLLM keeps its own
    ones."""
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
    """Describe layers of which only a part has come: vLLM would process them as they are."""
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or is_deferred_attention_layer(layer) or not info.load_numel:
            continue  # complete, or without weights of its own
        want = _loadable(layer, info.load_numel_total)
        if info.load_numel < want:
            name = name.removesuffix(_WRAPPED.rstrip("."))
            yield f"vLLM's layer {name} got {info.load_numel} of its {want} weights: the manifest lacks what it is made of"


def _loadable(layer: nn.Module, total: int) -> int:
    """Elements that a layer takes: all, but for the rows that pad a vocabulary."""
    if not isinstance(layer, VocabParallelEmbedding):
        return total
    shard = layer.shard_indices
    padding = layer.num_embeddings_per_partition - (shard.org_vocab_end_index - shard.org_vocab_start_index)
    return total - padding * layer.weight.shape[1]
