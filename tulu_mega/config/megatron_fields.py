"""Which fields the `[megatron]` table may set, read from megatron-core's source without importing it (or torch)."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

from tulu_mega.errors import nearest

# Fields our own settings decide; setting them twice could only contradict.
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

_SCALARS = {"int": int, "float": (int, float), "bool": bool, "str": str}


@functools.cache
def megatron_fields() -> dict[str, str]:
    """Name -> annotation of every TransformerConfig field of the installed megatron-core; empty when it is not installed."""
    package = importlib.util.find_spec("megatron")  # a namespace package: finding it imports nothing
    fields: dict[str, str] = {}
    for root in (package.submodule_search_locations or []) if package else []:
        for name in ("core/model_parallel_config.py", "core/transformer/transformer_config.py"):
            source = Path(root, name)
            if not source.is_file():
                continue
            for node in ast.parse(source.read_text()).body:
                if isinstance(node, ast.ClassDef) and node.name in ("ModelParallelConfig", "TransformerConfig"):
                    for item in node.body:
                        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                            fields[item.target.id] = ast.unparse(item.annotation)
    return fields


def _accepts(annotation: str, value: Any) -> bool:
    """Whether a TOML value can be of the annotated type. Types TOML cannot write (callables, enums) refuse everything."""
    parts = [part.strip() for part in annotation.replace("Optional[", "").rstrip("]").split("|")]
    known = [part for part in parts if part in _SCALARS or part.startswith(("List", "list", "Literal", "Union"))]
    for part in known:
        if part.startswith(("List", "list")):
            if isinstance(value, list):
                return True
        elif part not in _SCALARS:  # Literal and Union: megatron-core's own checks see to the rest
            return isinstance(value, (int, float, str, bool, list))
        elif isinstance(value, bool) == (part == "bool") and isinstance(value, _SCALARS[part]):
            return True
    return False


def check_megatron_table(table: dict[str, Any]) -> None:
    """Refuses fields that do not exist, that our settings own, or whose value has another type.

    Raises:
        ValueError: with every problem of the table.
    """
    known = megatron_fields() if table else {}  # parsing takes most of a second
    problems = []
    for name, value in table.items():
        if name in OWNED:
            problems.append(f"{name} is decided by {OWNED[name]}; set it there")
        elif known and name not in known:
            problems.append(
                f"{name} is not a field of megatron-core's TransformerConfig{nearest(name, known.keys() - OWNED.keys())}"
            )
        elif known and not _accepts(known[name], value):
            problems.append(f"{name} = {value!r}: megatron-core wants {known[name]}")
    if problems:
        raise ValueError("; ".join(problems))
