"""The kernels of a trainer's layers, which decide the memory that is kept for the backward pass and the memory traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tulu_mega.config import EngineSettings, OptimSettings
from tulu_mega.config.megatron_fields import ACTIVATION
from tulu_mega.config.training_fields import MOMENTS, OFFLOAD
from tulu_mega.plan.model.parameters import ITEMSIZE


@dataclass(frozen=True)
class Kernels:
    """The kernels of a layer; the defaults are those on GPUs with Transformer Engine."""

    transformer_engine: bool = True
    """whether layers are Transformer Engine's, else the local ones"""
    own_attention: bool = False
    """FlashAttention's or torch's for packed rows, which take the values as they lie in the projection's result"""
    activation: bool = True
    """SwiGLU is one kernel that keeps its input alone"""
    rope: bool = True
    """the rotary embedding is one kernel"""
    weight_gradients: bool = True
    """products add weights' gradients to the accumulated ones"""
    deallocate: bool = True
    """a pipeline stage's result is given back once it is sent"""
    user_buffers: bool = False
    """tensor-parallel messages pass in pieces while products go on (`tp_comm_overlap`), which this trainer cannot"""


FUSED = Kernels()


def kernels_of(settings: EngineSettings) -> Kernels:
    """The kernels that settings choose on GPUs; `model.spec = "auto"` is taken to find Transformer Engine there."""
    table, local = settings.megatron, settings.model.spec == "local"
    return Kernels(
        transformer_engine=not local,
        own_attention=local or settings.model.attention not in ("auto", "te"),
        activation=bool(table.get("bias_activation_fusion", not ACTIVATION & table.keys())),
        rope=bool(table.get("apply_rope_fusion", not local)),
        weight_gradients=bool(table.get("gradient_accumulation_fusion", True)),
        deallocate=bool(table.get("deallocate_pipeline_outputs", True)),
    )


def moment_bytes(optim: OptimSettings, optimizer: dict[str, Any]) -> float:
    """Bytes of each of the optimizer's two moments, the mean.

    Args:
        optimizer: the `[optimizer]` table, which may say it of Transformer Engine's AdamW.
    """
    if optim.name == "sgd":
        return 0
    return sum(ITEMSIZE[optimizer.get(name, optim.moments)] for name in MOMENTS) / len(MOMENTS)


def host_share(optimizer: dict[str, Any]) -> float:
    """Share of the optimizer's state that the `[optimizer]` table has put into main memory."""
    return optimizer.get("optimizer_offload_fraction", 0.0) if optimizer.get(OFFLOAD) else 0.0
