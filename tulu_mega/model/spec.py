"""Which modules a transformer layer is made of."""

from __future__ import annotations

import importlib.util
from typing import Literal

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from tulu_mega.errors import UserError
from tulu_mega.model.layers import PackedAttention, RMSNorm
from tulu_mega.platforms import Platform


def use_transformer_engine(spec: Literal["auto", "local", "te"], platform: Platform) -> bool:
    """Whether layers are Transformer Engine's.

    Raises:
        UserError: when they are asked for and cannot be had.
    """
    importable = platform.device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    if spec == "te" and not importable:
        raise UserError(
            "model.spec = 'te', but Transformer Engine is not importable on a CUDA device here; "
            "install transformer-engine[pytorch] or set model.spec to 'auto' or 'local'"
        )
    return importable and spec != "local"


def block_spec(config: TransformerConfig, transformer_engine: bool) -> TransformerBlockSubmodules:
    """Layers and final norm of this pipeline stage."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(), TENorm
    else:
        layer, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), RMSNorm
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.core_attention = PackedAttention
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage=None), layer_norm=norm)
