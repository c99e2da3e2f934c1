"""Hugging Face config and our settings to megatron-core's TransformerConfig."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from tulu_mega.config import EngineSettings, ParallelSettings
from tulu_mega.config.megatron_fields import ACTIVATION
from tulu_mega.config.recompute import Recomputed
from tulu_mega.errors import UserError
from tulu_mega.layout.stages import stage_layers
from tulu_mega.model.hf_config import head_dim, layer_needs
from tulu_mega.model.rope import ropes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(hf: PretrainedConfig, settings: EngineSettings, transformer_engine: bool) -> TransformerConfig:
    """The TransformerConfig of a decoder under the given layout.

    Args:
        hf: the model's config.
        settings: layout, precision, recompute and the `[megatron]` table.
        transformer_engine: whether the layers will be Transformer Engine's, whose fused kernels are then used.

    Raises:
        UserError: when megatron-core refuses the combination.
    """
    dtype = DTYPES[settings.model.dtype]
    parallel = settings.parallel
    needs, kinds = layer_needs(hf), ropes(hf).kinds
    fields = dict(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=head_dim(hf),
        ffn_hidden_size=hf.intermediate_size,
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=needs.qkv_bias,
        qk_layernorm=needs.qk_norm == "head",
        window_size=None if needs.window is None else (needs.window - 1, 0),  # tokens to the left and to the right
        window_attn_skip_freq=[int(windowed) for windowed in needs.windowed] or None,
        softmax_scale=kinds[0].softmax_scale() if len(kinds) == 1 else None,  # else each layer sets its own
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        init_method=_leave,
        output_layer_init_method=_leave,
        calculate_per_token_loss=True,  # losses are sums, divided once by the global count
        variable_seq_lengths=True,  # packs differ in length, which PackMessages knows
        moe_token_dispatcher_type="alltoall",  # what variable_seq_lengths asks for, even in a dense model
        **settings.precision.megatron,
        use_te_activation_func=not ACTIVATION & settings.megatron.keys(),  # the slot that holds our Swiglu
        apply_rope_fusion=transformer_engine,  # only Transformer Engine has such a kernel
        gradient_accumulation_fusion=adds_weight_gradients(transformer_engine),
        **computed_again(settings, transformer_engine).megatron,
        **_pipeline(hf, parallel),
    )
    try:
        return TransformerConfig(**(fields | settings.megatron))
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"megatron-core refuses this model and layout: {error}") from None


def adds_weight_gradients(transformer_engine: bool) -> bool:
    """Whether linear layers add each weight's gradient straight to its buffer by megatron-core's fusion: wherever products run
    on a GPU. On a CPU our own layers do so themselves, and megatron-core's, of bf16, would convert both factors."""
    return transformer_engine or torch.cuda.is_available()


def _leave(weight: torch.Tensor) -> None:
    """Initialises nothing: every weight comes from a checkpoint. (`perform_initialization=False` would also leave out the
    marks by which megatron-core knows a sharded parameter.)"""


def computed_again(settings: EngineSettings, transformer_engine: bool) -> Recomputed:
    """What the layers compute again. FP8 without Transformer Engine is a dry run, which computes nothing; megatron-core would
    compare that library's version, which there is none of."""
    return Recomputed() if settings.precision.recipe and not transformer_engine else settings.model.recomputed


def _pipeline(hf: PretrainedConfig, parallel: ParallelSettings) -> dict:
    """Which stage holds what, how stages communicate, and that what was sent is not kept."""
    if parallel.pipeline == 1:
        return {}
    stages = [["decoder"] * count for count in stage_layers(hf.to_dict(), parallel)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    fields = dict(
        pipeline_model_parallel_layout=stages,
        deallocate_pipeline_outputs=True,  # of an output that was sent only the graph is needed
        batch_p2p_sync=False,  # the wait for each message was for torch before 1.13 (pytorch/pytorch#82450)
    )
    if parallel.virtual_pipeline > 1:
        fields |= dict(
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            # two ranks are both neighbours of one another: batched sends and receives would be taken for each other
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
        )
    return fields

