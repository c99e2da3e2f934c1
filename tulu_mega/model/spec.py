"""The modules of a transformer layer."""

from __future__ import annotations

import importlib.util
from typing import Literal

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from transformers import PretrainedConfig

from tulu_mega.errors import UserError
from tulu_mega.model.attention import PackedAttention, by_segments
from tulu_mega.model.attention_choice import Attention
from tulu_mega.model.emptied import without_weight
from tulu_mega.model.hf_config import layer_needs
from tulu_mega.model.lean_mlp import LeanMLP
from tulu_mega.model.norms import AddNormed, ProjectionNorm, RMSNorm
from tulu_mega.model.rope import OwnRopeAttention, ropes
from tulu_mega.model.swiglu import Swiglu
from tulu_mega.outside.versions import INSTALL_ENGINE
from tulu_mega.platforms import Platform
from tulu_mega.platforms.cpu_speed.linear import linear_layers


def use_transformer_engine(spec: Literal["auto", "local", "te"], platform: Platform) -> bool:
    """Whether layers are Transformer Engine's.

    Raises:
        UserError: when they are asked for and cannot be had.
    """
    importable = platform.device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    if spec == "te" and not importable:
        raise UserError(
            "model.spec = 'te', but Transformer Engine is not importable on a CUDA device here; "
            f"{INSTALL_ENGINE}, or set model.spec to 'auto' or 'local'"
        )
    return importable and spec != "local"


def block_spec(
    config: TransformerConfig,
    hf: PretrainedConfig,
    transformer_engine: bool,
    attention: Attention,
    modules: frozenset[str] = frozenset(),
    vp_stage: int | None = None,
    apart: bool = False,
    without_weights: bool = False,
) -> TransformerBlockSubmodules:
    """Layers and final norm of this pipeline stage, or of the chunk `vp_stage` of it.

    Args:
        modules: modules that are computed again in the backward pass; see `Recomputed.modules`.
        apart: whether norms are modules of their own in Transformer Engine's layers too.
        without_weights: whether linear layers are megatron-core's and take no memory for weights, in whose place others come.

    Raises:
        UserError: when the family's layers have none of those.
    """
    layer, norm = layer_spec(config, hf, transformer_engine, attention, modules, apart, without_weights)
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm)


def layer_spec(
    config: TransformerConfig,
    hf: PretrainedConfig,
    transformer_engine: bool,
    attention: Attention,
    modules: frozenset[str] = frozenset(),
    apart: bool = False,
    without_weights: bool = False,
) -> tuple[ModuleSpec, type]:
    """A layer as the model's family needs it, and the class of its norms.

    Args:
        attention: of `choose_attention`.
        modules, apart, without_weights: as for `block_spec`.

    Raises:
        UserError: when the family's layers have none of those.
    """
    needs = layer_needs(hf)
    if "layernorm" in modules and needs.norms == "after":
        raise UserError(
            f"model.recompute = {sorted(modules)}: layers of {hf.model_type} norm what attention and feed-forward give, so no "
            "product keeps a norm's result; leave 'layernorm' out"
        )
    per_head = needs.qk_norm == "head"
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

        layer, norm, plain_linear = (
            get_gpt_layer_with_transformer_engine_spec(qk_layernorm=per_head),
            TENorm,
            TEColumnParallelLinear,
        )
        layer.submodules.mlp.submodules.activation_func = Swiglu
        if apart or "layernorm" in modules:
            _apart(layer.submodules, TENorm, TEColumnParallelLinear)
    else:
        plain_linear, cut_by_columns = linear_layers()
        layer, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), RMSNorm
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        attending, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
        attending.linear_qkv = mlp.linear_fc1 = plain_linear
        attending.linear_proj = mlp.linear_fc2 = cut_by_columns
        mlp.activation_func = Swiglu
    parts, attending = layer.submodules, layer.submodules.self_attention
    if attention == "te":
        attending.submodules.core_attention = by_segments(attending.submodules.core_attention)
    else:
        attending.submodules.core_attention = ModuleSpec(PackedAttention, {"kernel": attention})
    if per_head:
        attending.submodules.q_layernorm = attending.submodules.k_layernorm = norm
    if needs.qk_norm == "projection":
        attending.submodules.q_layernorm = ModuleSpec(ProjectionNorm, {"heads": config.num_attention_heads})
        attending.submodules.k_layernorm = ModuleSpec(ProjectionNorm, {"heads": config.num_query_groups})
    if "activation" in modules:
        parts.mlp.module = LeanMLP
    if needs.norms == "after":
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        attending.submodules.linear_qkv = parts.mlp.submodules.linear_fc1 = plain_linear  # Transformer Engine's have the norm in
        parts.self_attn_bda = parts.mlp_bda = ModuleSpec(AddNormed, {"config": config, "norm": norm})
    if without_weights:
        rows, columns = map(without_weight, linear_layers())
        attending.submodules.linear_qkv = parts.mlp.submodules.linear_fc1 = rows
        attending.submodules.linear_proj = parts.mlp.submodules.linear_fc2 = columns
    if needs.ropes:
        attending.module = OwnRopeAttention
        attending.params = attending.params | {"ropes": ropes(hf)}
    return layer, norm


def _apart(parts: TransformerLayerSubmodules, norm: type, linear: type) -> None:
    """Make norms modules of their own in Transformer Engine's layers: memory that its fused ones keep cannot be released."""
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    parts.self_attention.submodules.linear_qkv = parts.mlp.submodules.linear_fc1 = linear
    parts.sharded_state_dict_keys_map = get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map
