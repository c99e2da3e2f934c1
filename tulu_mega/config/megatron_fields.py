"""Which fields of megatron-core's TransformerConfig the `[megatron]` table may set."""

from __future__ import annotations

from typing import Any

from tulu_mega.config.passed_through import PassedThrough

OWNED = {
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "context_parallel_size": "parallel.context",
    "sequence_parallel": "parallel.sequence",
    "pipeline_model_parallel_layout": "parallel.first_stage_layers and parallel.last_stage_layers",
    "num_layers_in_first_pipeline_stage": "parallel.first_stage_layers",
    "num_layers_in_last_pipeline_stage": "parallel.last_stage_layers",
    "account_for_embedding_in_pipeline_split": "parallel.first_stage_layers",
    "account_for_loss_in_pipeline_split": "parallel.last_stage_layers",
    "microbatch_group_size_per_vp_stage": "parallel.pipeline",
    "overlap_p2p_comm": "parallel.virtual_pipeline",
    "batch_p2p_comm": "parallel.virtual_pipeline",
    "recompute_granularity": "model.recompute",
    "recompute_modules": "model.recompute",
    "recompute_method": "model.recompute_layers",
    "recompute_num_layers": "model.recompute_layers",
    "params_dtype": "model.dtype",
    "pipeline_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "fp8": "precision.fp8",
    "fp8_recipe": "precision.fp8",
    "fp8_param": "precision.fp8_param_gather",
    "first_last_layers_bf16": "precision.first_bf16 and precision.last_bf16",
    "num_layers_at_start_in_bf16": "precision.first_bf16",
    "num_layers_at_end_in_bf16": "precision.last_bf16",
    "calculate_per_token_loss": "the engine (losses are sums divided once)",
    "finalize_model_grads_func": "the engine",
    "grad_scale_func": "the engine",
    "no_sync_func": "the engine",
    "grad_sync_func": "the engine",
    "param_sync_func": "the engine",
    "timers": "the engine",
}
_FROM_HF = (
    "num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels layernorm_epsilon normalization "
    "gated_linear_unit activation_func add_bias_linear add_qkv_bias"
).split()
OWNED.update(dict.fromkeys(_FROM_HF, "the model's config.json"))

ACTIVATION = {
    "bias_activation_fusion", "activation_func_clamp_value", "glu_linear_offset", "activation_func_fp8_input_store",
}  # fmt: skip
"""Where one of these fields is set, megatron-core's own activation runs in the place of our SwiGLU."""
_CUDA_GRAPHS = "packs are of other lengths at each step, and a CUDA graph is of one"
REFUSED: dict[str, tuple[Any, str]] = {
    "use_te_activation_func": (None, "in that place feed-forwards have a fused SwiGLU of our own, whatever the layers are; for "
                               "megatron-core's own set bias_activation_fusion = true"),
    "tp_comm_overlap": (False, "Transformer Engine would look for user buffers of one fixed number of rows, which nobody makes: "
                        "packs are of other lengths at each step"),
    "enable_cuda_graph": (False, _CUDA_GRAPHS),
    "external_cuda_graph": (False, _CUDA_GRAPHS),
    "cuda_graph_impl": ("none", _CUDA_GRAPHS),
    "cuda_graph_scope": (None, _CUDA_GRAPHS),
    "variable_seq_lengths": (True, "packs are of other lengths at each step"),
    "use_ring_exchange_p2p": (False, "torch as it is released has no ring_exchange"),
    "defer_embedding_wgrad_compute": (False, "the head's gradient comes from our own log-prob step, chunk by chunk"),
    "perform_initialization": (True, "megatron-core would leave out the marks of sharded parameters; nothing is initialised"),
}  # fmt: skip
"""Fields with which a run could not work, the value with which it can (None: with none), and why."""
_REFUSED_WITH = {"tp_comm_": "tp_comm_overlap"}
"""Beginnings of names that mean something only with a field of `REFUSED`."""

MEGATRON = PassedThrough(
    "megatron",
    "TransformerConfig",
    {"core/model_parallel_config.py": "ModelParallelConfig", "core/transformer/transformer_config.py": "TransformerConfig"},
    OWNED,
    REFUSED,
    _REFUSED_WITH,
)
