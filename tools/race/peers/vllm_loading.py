"""What bench_sync.py races against, inside vLLM's worker: vLLM's own loading of tensors that lie in its memory."""

from __future__ import annotations

import time

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from tulu_mega.vllm_plugin.worker import WeightsReport
from tulu_mega.weight_transfer.protocol import DTYPES


class OwnLoading(WeightsReport):
    """Our report, and a clock (``--worker-extension-cls``)."""

    def own_loading(self) -> dict[str, float]:
        """Seconds that ``model.load_weights`` takes through the layerwise reload, of tensors such as our last update brought."""
        engine = self.weight_transfer_engine
        tensors = {name: torch.rand(each.shape, dtype=DTYPES[each.dtype]) for name, each in engine._ledger.manifest.items()}
        with set_current_vllm_config(self.vllm_config):
            start = time.perf_counter()
            initialize_layerwise_reload(engine.model)
            engine.model.load_weights(iter(tensors.items()))
            finalize_layerwise_reload(engine.model, engine.model_config)
            return {"seconds": time.perf_counter() - start}
