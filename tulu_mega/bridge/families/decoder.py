"""What decoder families have in common: rows of their tables and sizes from their config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tulu_mega.bridge.rules import Config, Cut, Rule
from tulu_mega.errors import UserError

_LAYER, _HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."


def layer_rule(megatron: str | Sequence[str], hf: dict[str, str], cut: Cut) -> Rule:
    """A row about a parameter of every layer.

    Args:
        megatron: its name within the layer, or one for each layer specification.
        hf: name of each Hugging Face tensor within the layer -> names of its sizes, ``"queries hidden"``.
    """
    names = (megatron,) if isinstance(megatron, str) else megatron
    return Rule(tuple(_LAYER + name for name in names), {_HF_LAYER + k: tuple(v.split()) for k, v in hf.items()}, cut)


EMBEDDING = Rule(("embedding.word_embeddings.weight",), {"model.embed_tokens.weight": ("vocab", "hidden")}, Cut.VOCAB)
NORM_BEFORE_ATTENTION = layer_rule(
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"), {"input_layernorm.weight": "hidden"}, Cut.COPY
)
QKV = layer_rule(
    "self_attention.linear_qkv.weight",
    {
        "self_attn.q_proj.weight": "queries hidden",
        "self_attn.k_proj.weight": "keys hidden",
        "self_attn.v_proj.weight": "keys hidden",
    },
    Cut.QKV,
)
QKV_BIAS = layer_rule(
    "self_attention.linear_qkv.bias",
    {"self_attn.q_proj.bias": "queries", "self_attn.k_proj.bias": "keys", "self_attn.v_proj.bias": "keys"},
    Cut.QKV,
)
HEAD_NORMS = (
    layer_rule("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "head"}, Cut.COPY),
    layer_rule("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "head"}, Cut.COPY),
)
PROJECTION_NORMS = (
    layer_rule("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "queries"}, Cut.COLUMN),
    layer_rule("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "keys"}, Cut.COLUMN),
)
ATTENTION_OUT = layer_rule("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "hidden queries"}, Cut.ROW)
NORM_AFTER_ATTENTION = layer_rule("self_attn_bda.norm.weight", {"post_attention_layernorm.weight": "hidden"}, Cut.COPY)
NORM_BEFORE_MLP = layer_rule(
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), {"post_attention_layernorm.weight": "hidden"}, Cut.COPY
)
MLP = (
    layer_rule("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"}, Cut.GATED),
    layer_rule("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "hidden ffn"}, Cut.ROW),
)
NORM_AFTER_MLP = layer_rule("mlp_bda.norm.weight", {"post_feedforward_layernorm.weight": "hidden"}, Cut.COPY)
FINAL = (
    Rule(("decoder.final_layernorm.weight",), {"model.norm.weight": ("hidden",)}, Cut.COPY),
    Rule(("output_layer.weight",), {"lm_head.weight": ("vocab", "hidden")}, Cut.VOCAB),
)

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Scalings of rotary embeddings that the model knows."""
_LARGEST, _MOST = 1 << 31, {"num_hidden_layers": 10_000}
"""What sizes may be: whatever is larger is a damaged file, over which loops would run for years."""
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def sizes(config: Config, written: Iterable[str] = (), biases: Iterable[str] = ()) -> dict[str, int]:
    """Vocabulary, hidden, ffn, queries, keys, head and groups of a decoder.

    Args:
        config: the model's config.json.
        written: keys beside the usual that config.json must have, because no value of theirs follows from others.
        biases: which of ``attention_bias`` and ``mlp_bias`` may be true: the family's table has these biases.

    Raises:
        UserError: with everything about the sizes that is missing or does not fit together.
    """
    given = {name: config.get(name) for name in (*_SIZES, *written)}
    given |= {name: config[name] for name in ("num_key_value_heads", "head_dim") if config.get(name) is not None}
    wrong = [
        f"config.json: {name} = {repr(value)[:100]}, expected a whole number from 1 to {_MOST.get(name, _LARGEST)}"
        for name, value in given.items()
        if type(value) is not int or not 1 <= value <= _MOST.get(name, _LARGEST)
    ]
    wrong += [
        f"config.json: {name} = true is not supported; only models without these biases are"
        for name in ("attention_bias", "mlp_bias")
        if config.get(name) and name not in biases
    ]
    if config.get("quantization_config"):
        wrong.append(
            "config.json: quantization_config says that the weights are quantised, which is not supported; give the whole "
            "weights, or remove the entry where they are"
        )
    if config.get("logit_scale") not in (None, 1):
        wrong.append(
            f"config.json: logit_scale = {str(config['logit_scale'])[:100]} is not supported: vLLM would scale logits by it, "
            "transformers would not"
        )
    if config.get("hidden_act", "silu") != "silu":
        wrong.append(f"config.json: hidden_act = {config['hidden_act']!r} is not supported; expected 'silu'")
    wrong += _unknown_ropes(config)
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads") or config.get("num_attention_heads")
    if not wrong:
        whole = [("num_attention_heads", "num_key_value_heads", groups)]
        if config.get("head_dim") is None:
            whole.append(("hidden_size", "num_attention_heads", heads))
        wrong += [
            f"config.json: {name} = {config[name]} is not a multiple of {by} = {parts}"
            for name, by, parts in whole
            if config[name] % parts
        ]
    if wrong:
        raise UserError(wrong)
    head = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "ffn": config["intermediate_size"],
        "queries": heads * head,
        "keys": groups * head,
        "head": head,
        "groups": groups,
    }


def _unknown_ropes(config: Config) -> list[str]:
    """Scalings that are not in `ROPE_TYPES`, and rotations of a part; newer files have ``rope_parameters``, for one RoPE or for
    several. Where a file has both, transformers takes the older."""
    partial = config.get("partial_rotary_factor")
    found = [] if partial in (None, 1) else [f"config.json: partial_rotary_factor = {str(partial)[:100]} is not supported"]
    return found + [each for key in ("rope_parameters", "rope_scaling") for each in _unknown_rope(config, key)]


def _unknown_rope(config: Config, key: str) -> list[str]:
    said = config.get(key) or {}
    if not isinstance(said, Mapping):
        return [f"config.json: {key} = {said!r}, expected an object"]
    entries = [each for each in said.values() if isinstance(each, Mapping)] or [said]
    kinds = [each.get("rope_type") or each.get("type") or "default" for each in entries]
    parts = [each["partial_rotary_factor"] for each in entries if each.get("partial_rotary_factor") not in (None, 1)]
    return [f"config.json: {key} has partial_rotary_factor = {str(part)[:100]}, which is not supported" for part in parts] + [
        f"config.json: {key} asks for rope_type {kind!r}, which is not supported; supported: {', '.join(ROPE_TYPES)}"
        for kind in kinds
        if kind not in ROPE_TYPES
    ]


def attention_types(config: Config, otherwise: Iterable[str]) -> tuple[str, ...]:
    """``full_attention`` or ``sliding_attention`` for each layer.

    Args:
        config: the model's config.json.
        otherwise: what transformers takes where config.json has no ``layer_types``.

    Raises:
        UserError: for other types, or not one for each layer.
    """
    given = config.get("layer_types")
    if given is not None and not isinstance(given, list | tuple):
        raise UserError(f"config.json: layer_types = {str(given)[:100]}, expected a list")
    types = tuple(given or otherwise)
    layers = config["num_hidden_layers"]
    if len(types) != layers:
        raise UserError(f"config.json: layer_types names {len(types)} layers, expected num_hidden_layers = {layers}")
    if odd := sorted({str(each) for each in types} - {"full_attention", "sliding_attention"}):
        raise UserError(f"config.json: layer_types has {', '.join(odd)}, expected full_attention or sliding_attention")
    return types


def window(size: object) -> int:
    """The length of a sliding window, checked.

    Raises:
        UserError: when it is no length.
    """
    if type(size) is not int or not 1 <= size <= _LARGEST:
        raise UserError(f"config.json: sliding_window = {str(size)[:100]}, expected a whole number of tokens from 1")
    return size
