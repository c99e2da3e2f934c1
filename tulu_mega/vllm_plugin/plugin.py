"""What vLLM calls in every process it starts (entry point ``vllm.general_plugins``): our engine under its name."""

from __future__ import annotations

from tulu_mega.vllm_plugin.gate import BACKEND


def register() -> None:
    """Tells vLLM's registry where the engine is; vLLM may call this more than once in a process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "tulu_mega.vllm_plugin.worker", "LiveWeightsEngine")
